"""Data sets of a user's own: opened like the others, and a sample that does not fit is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from utils.config.parse import config_from
from utils.data.datasets import DATASETS, build_dataset, resolve_data
from utils.data.loaders import build_loaders
from utils.data.register import register_dataset
from utils.errors import UserError


@pytest.fixture(autouse=True)
def registered():
    """What a test registers is forgotten after it."""
    known = dict(DATASETS)
    yield
    DATASETS.clear()
    DATASETS.update(known)


def register(sample, label=0, length=4, **facts):
    facts = {"classes": 2, "input_size": (1, 8, 12)} | facts
    register_dataset("own", lambda cfg, training: [(sample, label)] * (length if training else 2), **facts)


def settings(**values):
    base = {"dataset": "own", "num_classes": 2, "in_channels": 1, "plugin": "own.py", "workers": 0, "batch_size": 2}
    return config_from(base | values)


def image(channels=1):
    return np.full((8, 12, 3) if channels == 3 else (8, 12), 255, dtype=np.uint8)


def first(**values):
    return build_dataset(settings(**values), training=False)[0]


def test_size_and_statistics_are_the_registered_ones_until_a_setting_says_otherwise():
    register(image(3), input_size=(3, 8, 12), mean=(0.4,), std=(0.2, 0.3, 0.4))
    data = resolve_data(settings(in_channels=3))
    assert (data.input_size, data.mean, data.std) == ((3, 8, 12), (0.4, 0.4, 0.4), (0.2, 0.3, 0.4))
    assert resolve_data(settings(in_channels=3, img_size=16)).input_size == (3, 16, 16)
    with pytest.raises(UserError, match="num_classes: 3 does not fit dataset 'own', which has 2 classes"):
        resolve_data(settings(in_channels=3, num_classes=3))


@pytest.mark.parametrize("sample", [image(), Image.fromarray(image()), Image.fromarray(image(3))])
def test_an_image_is_normalised_and_comes_at_the_registered_size(sample):
    register(sample, label=np.int64(1), mean=(0.4,), std=(0.2,))
    loaders = build_loaders(settings(no_aug=True), device=torch.device("cpu"))
    loaders.set_epoch(0)
    for images, labels in (*loaders.train, *loaders.eval):
        torch.testing.assert_close(images, torch.full((2, 1, 8, 12), 3.0))  # (1 - 0.4) / 0.2
        assert labels.tolist() == [1, 1]
    assert (len(loaders.train), len(loaders.eval)) == (2, 1)


def test_event_frames_are_resized_and_not_normalised():
    register(torch.full((3, 2, 4, 4), 5, dtype=torch.int16), input_size=(2, 8, 8), events=True)
    frames, label = first(in_channels=2, time_steps=3)
    assert (frames.dtype, list(frames.shape), label) == (torch.float32, [3, 2, 8, 8], 0)
    assert frames.unique().tolist() == [5.0]
    loader = build_loaders(settings(in_channels=2, time_steps=3, event_hflip=1.0), device=torch.device("cpu")).eval
    assert next(iter(loader))[0].unique().tolist() == [5.0]


@pytest.mark.parametrize(
    ("sample", "label", "expected"),
    [
        (image(), 2, "sample 0: label 2; valid: 0 to 1"),
        (image(), -1, "sample 0: label -1; valid: 0 to 1"),
        (image().astype(np.float32), 0, "float32 [8, 12]; give a PIL image, or uint8 [H, W] or [H, W, 3]"),
        (np.zeros((3, 8, 12), np.uint8), 0, "uint8 [3, 8, 12]; give a PIL image"),
    ],
)
def test_a_sample_that_is_no_image_or_has_no_class_is_named(sample, label, expected):
    register(sample, label)
    with pytest.raises(UserError) as caught:
        first()
    assert str(caught.value).startswith("dataset 'own': sample 0: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (3, 1, 8, 8), (2, 8, 8)])
def test_frames_of_another_shape_are_named(shape):
    register(torch.zeros(shape), input_size=(2, 8, 8), events=True)
    with pytest.raises(UserError, match=r"sample 0: shape .*; give event counts \[T, 2, H, W\], T = 3"):
        first(in_channels=2, time_steps=3)


def test_settings_for_event_files_do_not_fit_frames_of_a_plugin():
    register(torch.full((3, 2, 8, 8), 300), input_size=(2, 8, 8), events=True)
    own = {"in_channels": 2, "time_steps": 3}
    with pytest.raises(UserError, match="event_drop: does not apply to 'own', whose frames a plugin makes"):
        build_dataset(settings(event_drop=True, **own), training=True)
    with pytest.raises(UserError, match="event_wire: uint8 cannot carry sample 0 of 'own'"):
        first(event_wire="uint8", **own)


@pytest.mark.parametrize(
    ("name", "facts", "expected"),
    [
        ("digits", {}, "there is a data set 'digits' already"),
        ("own", {"input_size": (2, 8, 8)}, "has channels 2; valid: 1 or 3 for images"),
        ("own", {"events": True}, "has channels 1; valid: 1 or 3 for images, 2 for event frames"),
    ],
)
def test_what_cannot_be_registered_is_said(name, facts, expected):
    with pytest.raises(ValueError, match=expected):
        register_dataset(name, lambda cfg, training: [], **({"classes": 2, "input_size": (1, 8, 8)} | facts))
