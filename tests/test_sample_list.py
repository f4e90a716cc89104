"""`train_split_path`: the listed samples are trained on, and no others."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from utils.config.parse import config_from
from utils.data.datasets import build_dataset, build_datasets
from utils.data.images import DigitsDataset
from utils.data.loaders import build_loaders
from utils.errors import UserError
from utils.events.digits import DIGITS_FILE

SMALL = {"img_size": 16, "pooling_stat": "0000", "workers": 0, "hflip": 0.0}


def digits(file: Path, **settings: Any) -> Any:
    return config_from(
        {**SMALL, "dataset": "digits", "num_classes": 10, "in_channels": 1, "train_split_path": str(file), **settings}
    )


def folder(root: Path, file: Path, dataset: str = "folder") -> Any:
    return config_from(
        {**SMALL, "dataset": dataset, "data_dir": str(root), "num_classes": 2, "train_split_path": str(file)}
    )


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """train/ and validation/ with three images of each of two classes."""
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def written(folder: Path, text: str) -> Path:
    file = folder / "list.txt"
    file.write_text(text)
    return file


def test_only_the_listed_samples_are_trained_on(tmp_path: Path) -> None:
    chosen = [5, 1000, 3, 77, 1436]
    cfg = digits(written(tmp_path, "\n".join(map(str, chosen)) + "\n\n"), no_aug=True, batch_size=5)
    train, evaluation = build_datasets(cfg)
    assert (len(train), len(evaluation)) == (5, 360)
    everything = DigitsDataset(DIGITS_FILE, train=True)
    (batch,) = build_loaders(cfg, device=torch.device("cpu")).train
    assert sorted(batch[1].tolist()) == sorted(int(everything.labels[i]) for i in chosen)
    whole = build_dataset(digits(written(tmp_path, "5"), no_aug=True), training=True)
    assert np.array_equal(whole[0][0], train[0][0])


def test_paths_choose_files_of_an_image_folder(pets: Path) -> None:
    train = build_dataset(folder(pets, written(pets, "dog/2.png\r\n./cat/0.png\n")), training=True)
    train.dataset.transform = np.asarray
    assert [(int(image[0, 0, 0]), label) for image, label in (train[i] for i in range(len(train)))] == [(2, 1), (0, 0)]


def test_names_choose_samples_of_shards(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for i in range(3):
                image = io.BytesIO()
                Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(image, format="png")
                for name, data in ((f"{i}.png", image.getvalue()), (f"{i}.cls", b"1")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    train = build_dataset(folder(tmp_path, written(tmp_path, "train.tar/2\n"), "wds/pets"), training=True)
    train.dataset.transform = np.asarray
    assert [int(train[i][0][0, 0, 0]) for i in range(len(train))] == [2]


def test_the_list_goes_together_with_aug_splits_and_the_check_of_classes(pets: Path) -> None:
    cfg = digits(written(pets, "7\n8"), aug_splits=2, aa="rand-m9-n1")
    assert len(build_dataset(cfg, training=True)[1][0]) == 2
    (pets / "validation" / "dog").rename(pets / "validation" / "fox")
    with pytest.raises(UserError, match="have different class folders"):
        build_datasets(folder(pets, written(pets, "0")))


def test_an_incomplete_batch_of_the_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size: 4 is more than the 3 training samples"):
        build_loaders(digits(written(tmp_path, "1\n2\n3"), batch_size=4), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.txt is empty; give one sample per line, or leave train_split_path out"),
        ("\n \n", "list.txt is empty"),
        ("1\n1437\n", r"list.txt, line 2: '1437' is no sample of this split; valid: 0 to 1436$"),
        ("1\n-1\n", "list.txt: the samples of this data set have no names; give numbers from 0 to 1436"),
        ("1\n" + "9" * 5000 + "\n", "list.txt, line 2: '9999.* is no sample of this split; valid: 0 to 1436$"),
        ("1\n2\n\n01\n", "list.txt, line 4: '01' is already in line 1; remove one"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match="^train_split_path: .*" + message) as caught:
        build_dataset(digits(written(tmp_path, text)), training=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat/0.png\ncat/O.png\n", r"line 2: 'cat/O.png' is no sample .*0 to 5, or names as 'cat/0.png'; did you mean"),
        ("cat/0.png\n3\n", "line 2: '3' is no sample of this split"),
        ("cat/0.png\ndog/1.png\n./cat/0.png", "line 3: './cat/0.png' is already in line 1; remove one"),
        ("6\n", "line 1: '6' is no sample of this split; valid: 0 to 5, or names as"),
    ],
)
def test_names_that_do_not_fit_are_refused(pets: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match="^train_split_path: .*list.txt, " + message):
        build_dataset(folder(pets, written(pets, text)), training=True)


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.txt cannot be read \(No such file or directory\); give a text file"):
        build_dataset(digits(tmp_path / "none.txt"), training=True)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary cannot be read .it is no UTF-8 text"):
        build_dataset(digits(tmp_path / "binary"), training=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe cannot be read \(it is no regular file\)"):
        build_dataset(digits(tmp_path / "pipe"), training=True)


def test_the_evaluation_needs_no_list(tmp_path: Path) -> None:
    assert len(build_dataset(digits(tmp_path / "none.txt"), training=False)) == 360
