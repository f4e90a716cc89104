"""Hugging Face data sets through timm's reader, with a stand-in for the `datasets` package, which is optional."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from utils.config.parse import config_from
from utils.data.datasets import build_dataset, build_datasets
from utils.data.loaders import build_loaders
from utils.errors import UserError

READERS = ("timm.data.readers.reader_hfds", "timm.data.readers._hfds")  # they keep the package they found first


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), grey, np.uint8)).save(file, format="png")
    return file.getvalue()


class HubSplit:
    """What timm's reader uses of `datasets.Dataset`: 9 images of two classes; the grey level is the number."""

    def __init__(self, rows: list[dict[str, Any]], split: str) -> None:
        self.rows = rows
        label = types.SimpleNamespace(names=["cat", "dog"], str2int=["cat", "dog"].index)
        sizes = types.SimpleNamespace(num_examples=len(rows))
        self.info = types.SimpleNamespace(features={"label": label}, splits={split: sizes})

    def cast_column(self, name: str, feature: Any) -> HubSplit:
        assert (name, feature) == ("image", "as a file")
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, to be changed by the test."""
    rows = {
        split: [{"image": {"bytes": png(i), "path": None}, "label": i % 2} for i in range(9)]
        for split in ("train", "validation")
    }

    def load_dataset(name: str, split: str, cache_dir: str | None = None, trust_remote_code: bool = False) -> HubSplit:
        assert name == "someone/pets"
        if split not in rows:
            raise ValueError(f'Unknown split "{split}".')
        return HubSplit(rows[split], split)

    package = types.ModuleType("datasets")
    package.__dict__.update(load_dataset=load_dataset, Image=lambda decode: "decoded" if decode else "as a file")
    monkeypatch.setitem(sys.modules, "datasets", package)
    for reader in READERS:
        monkeypatch.delitem(sys.modules, reader, raising=False)
    yield rows
    for reader in READERS:  # the stand-in must not outlive the test
        sys.modules.pop(reader, None)


def config(**settings: Any) -> Any:
    defaults = {"dataset": "hfds/someone/pets", "num_classes": 2, "img_size": 16, "pooling_stat": "0000"}
    return config_from({**defaults, "workers": 0, "batch_size": 2, "val_batch_size": 2, **settings})


def test_images_and_labels(hub: Any) -> None:
    for dataset in build_datasets(config()):
        dataset.transform = np.asarray
        found = [dataset[i] for i in range(len(dataset))]
        assert [(int(image[0, 0, 0]), image.shape, label) for image, label in found] == [
            (i, (16, 16, 3), i % 2) for i in range(9)
        ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_sample_once(hub: Any, world_size: int) -> None:
    ranks = range(world_size)
    built = [build_loaders(config(), device=torch.device("cpu"), rank=rank, world_size=world_size) for rank in ranks]
    seen = torch.cat([images.mean((1, 2, 3)) for loaders in built for images, _ in loaders.eval])
    assert len(seen.unique()) == len(seen) == 9


def test_a_damaged_image_is_an_error_not_its_neighbour(hub: Any) -> None:
    hub["validation"][3]["image"]["bytes"] = png(3)[:50]
    dataset = build_dataset(config(), training=False)
    with pytest.raises(UserError, match=r"hfds/someone/pets, sample 3, is damaged \(.*\); replace or remove it"):
        dataset[3]


@pytest.mark.parametrize("label", [-1, 2, None])
def test_a_label_that_is_no_class_is_refused(hub: Any, label: int | None) -> None:
    hub["validation"][3]["label"] = label
    with pytest.raises(UserError, match=rf"sample 3 has label {label}, which does not fit num_classes 2 .*0 to 1"):
        build_dataset(config(), training=False)[3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1000}, "num_classes: 1000 does not fit .* which has 2 classes; set num_classes: 2"),
        ({"val_split": "holdout"}, "split 'holdout' .* missing or damaged .*; check its name, its splits and the netw"),
    ],
)
def test_settings_that_do_not_fit_are_refused(hub: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_datasets(config(**settings))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for reader in READERS:
        monkeypatch.delitem(sys.modules, reader, raising=False)
    with pytest.raises(UserError, match=r"install that package \(pip install datasets\)"):
        build_datasets(config())
