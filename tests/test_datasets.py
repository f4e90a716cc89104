"""Data sets: the embedded digits, image folders and CIFAR on disk, and what is said of missing files."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from utils.config.parse import config_from
from utils.config.policies import why_no_policy
from utils.config.settings import EVENT_DATASETS, Config
from utils.data.datasets import (
    DATASETS,
    DIGITS,
    build_dataset,
    build_datasets,
    dataset_facts,
    resolve_data,
)
from utils.data.images import DigitsDataset, decode
from utils.data.register import register_dataset
from utils.errors import UserError
from utils.events.digits import DIGITS_FILE
from utils.events.sources import SOURCES


def digits_config(**settings: Any) -> Config:
    defaults = {"dataset": "digits", "num_classes": 10, "in_channels": 1, "hflip": 0.0, "img_size": 16}
    return config_from({**defaults, **settings})


def folder_config(root: Path, **settings: Any) -> Config:
    defaults = {"dataset": "imagenet", "data_dir": str(root), "num_classes": 2, "img_size": 32}
    return config_from({**defaults, **settings})


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and validation/ with two classes of three images: RGB, palette, grey with alpha; odd sizes."""
    generator = np.random.RandomState(0)
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i, mode in enumerate(("RGB", "P", "LA")):
                pixels = generator.randint(0, 256, (37 + i, 51, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return tmp_path


# --- the embedded digits ---------------------------------------------------------------------------------


def test_digits_split_is_stratified() -> None:
    with np.load(DIGITS_FILE, allow_pickle=False) as content:
        labels, is_test = content["labels"], content["is_test"]
    test, everything = np.bincount(labels[is_test]), np.bincount(labels)
    assert (test.sum(), everything.sum()) == (360, 1797)
    assert np.all(np.abs(test - everything * 360 / 1797) < 1)


def test_digits_are_grey_images_of_the_full_range() -> None:
    train = DigitsDataset(DIGITS_FILE, train=True)
    image, label = train[0]
    assert (image.mode, image.size, type(label)) == ("L", (8, 8), int)
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert len(np.unique(train.images)) == 17


def test_digits_statistics_are_those_of_the_training_split() -> None:
    pixels = DigitsDataset(DIGITS_FILE, train=True).images / 255
    assert DIGITS.mean == pytest.approx([pixels.mean()], abs=5e-5)
    assert DIGITS.std == pytest.approx([pixels.std()], abs=5e-5)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn, its source, is missing")
def test_digits_file_is_what_its_script_makes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_digits", DIGITS_FILE.with_name("make_digits.py"))
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(tmp_path / "digits.npz")
    assert (tmp_path / "digits.npz").read_bytes() == DIGITS_FILE.read_bytes()


def test_digits_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, evaluation = build_datasets(digits_config())
    assert (len(train), len(evaluation)) == (1437, 360)


@pytest.mark.parametrize("split", ["validation", "val", "test"])
def test_digits_know_the_synonyms_of_their_splits(split: str) -> None:
    assert len(build_dataset(digits_config(val_split=split), training=False)) == 360


@pytest.mark.parametrize("damage", [lambda file: file[:100], lambda file: b"", lambda file: b"x" * 500])
def test_a_damaged_file_of_digits_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "digits.npz").write_bytes(damage(DIGITS_FILE.read_bytes()))
    with pytest.raises(UserError, match=r"digits\.npz cannot be read \(.+\); leave data_dir out"):
        build_dataset(digits_config(data_dir=str(tmp_path)), training=False)


def test_a_file_without_digits_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "digits.npz", other=np.zeros(1))
    with pytest.raises(UserError, match=r"digits\.npz cannot be read"):
        build_dataset(digits_config(data_dir=str(tmp_path)), training=False)


def test_a_split_that_digits_lack_is_refused() -> None:
    with pytest.raises(UserError, match="val_split: 'holdout' is no split of dataset 'digits'; valid: train"):
        build_dataset(digits_config(val_split="holdout"), training=False)


@pytest.mark.parametrize("size", [16, 32, 33])
@pytest.mark.parametrize("on_device", [True, False])
def test_digits_transforms(size: int, on_device: bool) -> None:
    # 33 pixels need a pooling_stat that does not halve them.
    cfg = digits_config(img_size=size, no_prefetcher=not on_device, pooling_stat="0000")
    for dataset in build_datasets(cfg):
        image, label = dataset[0]
        image = torch.as_tensor(image)
        assert image.shape == (1, size, size)
        assert image.dtype == (torch.uint8 if on_device else torch.float32)
        assert 0 <= label < 10


@pytest.mark.parametrize("aa", ["rand-m9-n1-mstd0.4-inc1", "rand-m10-n2-inc1", "augmix-m5-w4-d2", "original", "v0"])
def test_policies_survive_grey_images_and_magnitude_ten(aa: str) -> None:
    train = build_dataset(digits_config(aa=aa), training=True)
    for i in range(400):
        assert torch.as_tensor(train[i][0]).shape == (1, 16, 16)


def test_every_policy_that_the_settings_allow_is_one_for_timm() -> None:
    rng, built = random.Random(0), 0
    parts = ("m0", "m9", "m99", "n1", "n12", "p0", "p0.25", "p1", "mstd0", "mstd0.5", "mstd101", "mmax10", "inc1")
    parts += ("t3a", "t3aw", "tweights", "w1", "w3", "d1", "d2", "b0", "b1")
    for _ in range(400):
        name = rng.choice(("rand", "augmix", "original", "originalr", "v0", "v0r", "3a"))
        aa = "-".join([name, *rng.sample(parts, rng.randrange(4))])
        if not why_no_policy(aa):
            built += 1
            build_dataset(digits_config(aa=aa), training=True)
    assert built > 50


@pytest.mark.parametrize(("setting", "axis"), [("hflip", -1), ("vflip", -2)])
def test_flips_mirror_the_axis_that_they_name(setting: str, axis: int) -> None:
    whole = dict(scale=[1, 1], ratio=[1, 1], color_jitter=0.0, train_interpolation="nearest", hflip=0.0)
    plain, flipped = (build_dataset(digits_config(**whole | more), training=True) for more in ({}, {setting: 1.0}))
    for i in range(5):
        image, mirrored = (torch.as_tensor(dataset[i][0]) for dataset in (plain, flipped))
        assert torch.equal(mirrored, image.flip(axis))
        assert not torch.equal(mirrored, image)


def test_settings_reach_the_transforms_of_training() -> None:
    def steps(**settings: Any) -> dict[str, Any]:
        transform = build_dataset(digits_config(**settings), training=True).transform
        return {type(step).__name__: step for step in transform.transforms}

    crop = steps(scale=[0.3, 0.6], ratio=[0.5, 2], train_interpolation="bilinear")["RandomResizedCropAndInterpolation"]
    assert (tuple(crop.scale), tuple(crop.ratio), crop.interpolation.name) == ((0.3, 0.6), (0.5, 2), "BILINEAR")
    jitter = steps(color_jitter=0.25)["ColorJitter"]
    assert (jitter.brightness, jitter.contrast) == ((0.75, 1.25), (0.75, 1.25))
    flips = steps(hflip=0.3, vflip=0.4)
    assert (flips["RandomHorizontalFlip"].p, flips["RandomVerticalFlip"].p) == (0.3, 0.4)
    policy = steps(aa="rand-m7-n3")["RandAugment"]
    assert (policy.num_layers, {operation.magnitude for operation in policy.ops}) == (3, {7.0})
    assert "AutoAugment" in steps(aa="original")
    plain = steps(no_aug=True, hflip=1.0, aa="original", color_jitter=0.5)
    assert not {"RandomHorizontalFlip", "AutoAugment", "ColorJitter"} & plain.keys()


def test_mirrored_digits_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_dataset(digits_config(hflip=0.5), training=True)
    assert "set hflip: 0" in caplog.text


def test_aug_splits_give_one_clean_and_one_augmented_copy() -> None:
    train = build_dataset(digits_config(aug_splits=2, aa="rand-m9-n3-inc1", scale=[1, 1], ratio=[1, 1]), training=True)
    pairs = [train[i][0] for i in range(20)]
    assert {len(pair) for pair in pairs} == {2}
    assert any(not np.array_equal(clean, augmented) for clean, augmented in pairs)


def test_aug_splits_without_augmentation_are_refused() -> None:
    with pytest.raises(UserError, match="aug_splits: needs augmentation, but no_aug is on"):
        build_dataset(digits_config(aug_splits=2, no_aug=True), training=True)


# --- a set of one's own -----------------------------------------------------------------------------------


class Stripes:
    """Six images of two classes."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        return Image.new("RGB", (9, 9), (40 * index,) * 3), index % 2


def test_a_set_of_images_needs_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "stripes", DATASETS["digits"])  # so that the name is free again afterwards
    del DATASETS["stripes"]
    register_dataset("stripes", lambda cfg, training: Stripes(), classes=2, input_size=(3, 16, 16))
    train, evaluation = build_datasets(config_from({"dataset": "stripes", "num_classes": 2}))
    assert torch.as_tensor(train[1][0]).shape == (3, 16, 16)
    assert [evaluation[i][1] for i in range(len(evaluation))] == [0, 1] * 3
    with pytest.raises(UserError, match="num_classes: 3 does not fit dataset 'stripes', which has 2 classes"):
        build_datasets(config_from({"dataset": "stripes", "num_classes": 3}))
    with pytest.raises(UserError, match=r"dataset: 'stripe' is unknown; valid: .*; did you mean stripes?"):
        build_datasets(config_from({"dataset": "stripe"}))
    with pytest.raises(ValueError, match="there is a data set 'stripes' already"):
        register_dataset("stripes", lambda cfg, training: Stripes(), classes=2, input_size=(3, 16, 16))


def test_the_settings_know_the_event_sets() -> None:
    assert tuple(SOURCES) == EVENT_DATASETS


# --- facts and settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_known_name_resolves(name: str) -> None:
    facts = DATASETS[name]
    cfg = config_from({"dataset": name, "num_classes": facts.classes or 7, "in_channels": facts.channels or 3})
    settings = resolve_data(cfg)
    assert settings.input_size == (cfg.in_channels, facts.image_size, facts.image_size)
    assert len(settings.mean) == len(settings.std) == cfg.in_channels


def test_settings_come_from_the_config_before_the_facts() -> None:
    cfg = digits_config(
        img_size=None, input_size=[1, 16, 32], mean=[0.5], std=[0.25], crop_pct=0.5, interpolation="box"
    )
    settings = resolve_data(cfg)
    assert settings.input_size == settings.eval_size == (1, 16, 32)
    assert (settings.mean, settings.std) == ((0.5,), (0.25,))
    assert (settings.crop_pct, settings.interpolation) == (0.5, "box")
    for_all = resolve_data(config_from({"dataset": "torch/cifar10", "num_classes": 10, "mean": [0.4], "std": [0.2]}))
    assert (for_all.mean, for_all.std) == ((0.4,) * 3, (0.2,) * 3)


def test_large_valid_resizes_to_320_and_crops_288(image_folder: Path) -> None:
    dataset = build_dataset(folder_config(image_folder, large_valid=True, crop_pct=0.95), training=False)
    resize, crop = dataset.transform.transforms[1:3]
    assert (resize.size, resize.interpolation.value, tuple(crop.size)) == (320, "bilinear", (288, 288))
    assert torch.as_tensor(dataset[0][0]).shape == (3, 288, 288)


def test_random_erasing_is_left_to_the_workers() -> None:
    assert resolve_data(digits_config()).normalise_on_device
    assert not resolve_data(digits_config(reprob=0.1)).normalise_on_device


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1000}, "num_classes: 1000 does not fit dataset 'digits', which has 10 .*: 10$"),
        ({"in_channels": 3}, "in_channels: 3 does not fit dataset 'digits', which has 1; set in_channels: 1"),
        ({"large_valid": True}, "large_valid: .* does not fit dataset 'digits'"),
        ({"dataset": "digit"}, "dataset: 'digit' is unknown; valid: digits, .*; did you mean digits?"),
        ({"dataset": "torch/cifar11"}, "did you mean torch/cifar10"),
        ({"dataset": "tfds/imagenet"}, "dataset: 'tfds/imagenet' is a stream, .* use hfds/<name>"),
        (
            {"dataset": "folder", "in_channels": 2},
            r"in_channels: 2 does not fit images; valid: 1 \(grey\), 3 \(RGB\)",
        ),
        ({"dataset": "folder"}, "mean: no default for dataset 'folder', but in_channels is 1; give one value"),
    ],
)
def test_settings_that_contradict_the_data_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_data(digits_config(**settings))


@pytest.mark.parametrize("name", ["cifar10-dvs", "cifar10-dvs-tet", "gesture"])
def test_event_sets_without_files_say_which_and_where(name: str, tmp_path: Path) -> None:
    facts = dataset_facts(name)
    cfg = config_from({"dataset": name, "num_classes": facts.classes, "in_channels": 2, "data_dir": str(tmp_path)})
    with pytest.raises(UserError, match=rf"(?s){tmp_path}.*python -m utils\.prepare {name} --data-dir {tmp_path}"):
        build_datasets(cfg)


# --- image folders ---------------------------------------------------------------------------------------


def test_image_folders_load_whatever_the_mode_of_the_files(image_folder: Path) -> None:
    for dataset in build_datasets(folder_config(image_folder)):
        assert len(dataset) == 6
        assert [dataset[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
        assert {torch.as_tensor(dataset[i][0]).shape for i in range(6)} == {(3, 32, 32)}


def test_image_folders_can_be_read_as_grey(image_folder: Path) -> None:
    cfg = folder_config(image_folder, in_channels=1, mean=[0.5], std=[0.5])
    assert torch.as_tensor(build_dataset(cfg, training=False)[0][0]).shape == (1, 32, 32)


def test_the_split_folder_may_have_a_synonym(image_folder: Path) -> None:
    (image_folder / "validation").rename(image_folder / "val")
    assert len(build_dataset(folder_config(image_folder), training=False)) == 6


def test_images_below_subfolders_are_found(image_folder: Path) -> None:
    group = image_folder / "train" / "animals"
    group.mkdir()
    for name in ("cat", "dog"):
        (image_folder / "train" / name).rename(group / name)
    assert len(build_datasets(folder_config(image_folder))[0]) == 6


def test_a_damaged_image_is_named(image_folder: Path) -> None:
    (image_folder / "validation" / "dog" / "1.png").write_bytes(b"no image")
    dataset = build_dataset(folder_config(image_folder), training=False)
    with pytest.raises(UserError, match=r"data_dir: .*/validation/dog/1.png is damaged .*; replace or remove it"):
        dataset[4]


def test_an_empty_class_folder_is_refused(image_folder: Path) -> None:
    (image_folder / "train" / "bird").mkdir()
    with pytest.raises(UserError, match=r"data_dir: class folder .*/train/bird holds no images; fill or remove it"):
        build_datasets(folder_config(image_folder))


def test_a_class_of_one_split_only_is_refused(image_folder: Path) -> None:
    (image_folder / "validation" / "dog").rename(image_folder / "validation" / "fox")
    with pytest.raises(UserError, match=r"'train' and 'validation' have different class folders .2 in one of them"):
        build_datasets(folder_config(image_folder))


def test_a_folder_without_the_split_is_refused(image_folder: Path) -> None:
    with pytest.raises(UserError, match=r"val_split: 'test': no folder of that name in .* \(tried test\)"):
        build_dataset(folder_config(image_folder, val_split="test"), training=False)


def test_a_split_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"data_dir: .*/train holds no images; expected .*/<class>/<image>"):
        build_dataset(folder_config(tmp_path), training=True)


def test_a_root_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_dir: .*/nowhere is no folder; expected .*/train/<class>/<image>"):
        build_dataset(folder_config(tmp_path / "nowhere"), training=True)


def test_imagenet_has_no_default_root() -> None:
    with pytest.raises(UserError, match="data_dir: dataset 'imagenet' has no default folder; give --data-dir"):
        build_datasets(config_from({"dataset": "imagenet"}))


def test_the_number_of_class_folders_is_checked(image_folder: Path) -> None:
    with pytest.raises(UserError, match=r"num_classes: 1000 .* which has 2 classes; set num_classes: 2"):
        build_datasets(folder_config(image_folder, num_classes=1000))


# --- torchvision's sets ----------------------------------------------------------------------------------


def test_missing_cifar_names_the_path_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"data/cifar-10-batches-py is missing or damaged .*; add --dataset-download"
    ) as e:
        build_datasets(config_from({"num_classes": 10}))
    assert "\n" not in str(e.value)


def test_cifar_loads_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    content = {
        "test_batch": {"data": np.full((4, 3072), 7, np.uint8), "labels": [3, 2, 1, 0]},
        "data_batch_1": {"data": np.full((6, 3072), 9, np.uint8), "labels": list(range(6))},
        "batches.meta": {"label_names": [f"class {i}" for i in range(10)]},
    }
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
    # Without checksums torchvision takes any file of the right name.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    train, evaluation = build_datasets(config_from({"num_classes": 10, "data_dir": str(tmp_path)}))
    assert (len(train), len(evaluation)) == (6, 4)
    image, label = evaluation[0]
    assert torch.as_tensor(image).unique().tolist() == [7]
    assert (tuple(image.shape), label) == ((3, 32, 32), 3)


def test_a_torchvision_set_without_default_root_asks_for_one() -> None:
    with pytest.raises(UserError, match="data_dir: dataset 'torch/mnist' has no default folder"):
        build_datasets(config_from({"dataset": "torch/mnist", "num_classes": 10}))


# --- images of other kinds of numbers, and damaged ones ---------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_16_bit_image_keeps_its_upper_8_bits(tmp_path: Path, mode: str) -> None:
    values = np.arange(0, 2**16, 37, dtype=np.uint16)[: 40 * 40].reshape(40, 40)
    Image.fromarray(values).save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file:
        image = decode(file, mode, "a.png")
    assert image.mode == mode
    assert np.array_equal(np.asarray(image.convert("L")), values >> 8)


@pytest.mark.parametrize("pixels", [np.full((4, 4), 70000, np.int32), np.full((4, 4), 0.5, np.float32)])
def test_an_image_whose_white_is_not_known_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    with (
        (tmp_path / "a.tiff").open("rb") as file,
        pytest.raises(UserError, match=r"a\.tiff: its pixels are numbers of"),
    ):
        decode(file, "RGB", "a.tiff")


FORMATS = ("bmp", "dds", "gif", "ico", "jpeg", "pcx", "png", "ppm", "sgi", "tga", "tiff", "webp")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd metadata
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_is_an_image_or_one_message(kind: str) -> None:
    draw = random.Random(kind)
    whole = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), np.uint8)).save(whole, format=kind)
    refused = 0
    for _ in range(60):
        content = bytearray(whole.getvalue())
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(min(len(content), 200))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        del content[draw.choice([len(content), draw.randrange(len(content))]) :]
        try:
            assert decode(io.BytesIO(content), "RGB", "a file").mode == "RGB"
        except UserError as error:
            refused += str(error).startswith("data_dir: a file")
    assert refused > 5


def test_a_pipe_among_the_images_is_not_waited_for(image_folder: Path) -> None:
    os.mkfifo(image_folder / "train" / "cat" / "9.png")
    train = build_dataset(folder_config(image_folder), training=True)
    assert len(train) == 7
    with pytest.raises(UserError, match=r"cat/9\.png cannot be read \(it is no regular file\)"):
        [train[i] for i in range(7)]


@pytest.mark.parametrize(
    "wrong",
    [{"images": np.zeros((3, 8, 8), np.uint8)}, {"images": np.full((1797, 8, 8), 99, np.uint8)},
     {"labels": np.full(1797, 10)}, {"labels": np.full(1797, "x")}, {"is_test": np.zeros(5, bool)},
     {"is_test": np.zeros(1797)}],
)  # fmt: skip
def test_a_file_of_other_digits_is_named(tmp_path: Path, wrong: dict[str, np.ndarray]) -> None:
    with np.load(DIGITS_FILE) as content:
        np.savez(tmp_path / "digits.npz", **({name: content[name] for name in content.files} | wrong))
    with pytest.raises(UserError, match=r"digits\.npz cannot be read"):
        build_dataset(digits_config(data_dir=str(tmp_path)), training=False)
