"""Tars and WebDataset shards: the right samples with the right labels, each exactly once, and plain errors."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from utils.config.parse import config_from
from utils.data import tar_index as index_module
from utils.data.datasets import build_dataset, build_datasets
from utils.data.images import DigitsDataset
from utils.data.loaders import Loaders, build_loaders
from utils.data.tars import TarDataset
from utils.errors import UserError
from utils.events.digits import DIGITS_FILE

CPU = torch.device("cpu")
Content = dict[str, bytes]


def png(grey: int, extension: str = "png") -> bytes:
    """A 16 x 16 image of one grey level, which so tells the samples apart."""
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(file, format=extension)
    return file.getvalue()


def write_tar(file: Path, content: Content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file


def samples(first: int, count: int) -> Content:
    """WebDataset samples; label = number % 2, by turns as .cls and .json, grey level = number."""
    content: Content = {}
    for i in range(first, first + count):
        content[f"{i:05}.png"] = png(i)
        content[f"{i:05}.cls" if i % 3 else f"{i:05}.json"] = (
            str(i % 2).encode() if i % 3 else json.dumps({"label": i % 2, "text": "dog"}).encode()
        )
    return content


def config(root: Path, dataset: str = "wds/tiny", **settings: Any) -> Any:
    defaults = {"dataset": dataset, "data_dir": str(root), "num_classes": 2, "img_size": 16, "workers": 0}
    return config_from({**defaults, "pooling_stat": "0000", **settings})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of 23 training samples, and two of 7 evaluation samples."""
    write_tar(tmp_path / "tiny-train-0000.tar", samples(0, 11))
    write_tar(tmp_path / "tiny-train-0001.tar", samples(11, 12))
    write_tar(tmp_path / "tiny-validation-0000.tar", samples(100, 3))
    write_tar(tmp_path / "tiny-validation-0001.tar", samples(103, 4))
    return tmp_path


@pytest.fixture
def class_tars(tmp_path: Path) -> Path:
    """train/ with a tar per class, validation.tar with a folder per class; class 10 is after 2 as in timm."""
    for name, level in (("n2", 0), ("n10", 50)):
        write_tar(tmp_path / "train" / f"{name}.tar", {f"{name}_{i}.png": png(level + i) for i in range(3)})
    write_tar(tmp_path / "validation.tar", {f"./val/{name}/{i}.png": png(i) for name in ("n10", "n2") for i in (1, 2)})
    return tmp_path


def greys(dataset: Any) -> list[tuple[int, int]]:
    """(grey level, label) of each sample."""
    dataset.transform = np.asarray
    return [(int(image[0, 0, 0]), label) for image, label in (dataset[i] for i in range(len(dataset)))]


# --- what is read ----------------------------------------------------------------------------------------


def test_shards_hold_each_sample_with_its_label(shards: Path) -> None:
    train, evaluation = build_datasets(config(shards))
    assert greys(train) == [(i, i % 2) for i in range(23)]
    assert greys(evaluation) == [(i, i % 2) for i in range(100, 107)]


@pytest.mark.parametrize("split", ["tiny-train-{0000..0001}.tar", "tiny-train-*.tar", "training"])
def test_shards_are_found_by_pattern_and_synonym(shards: Path, split: str) -> None:
    assert len(build_dataset(config(shards, train_split=split), training=True)) == 23


def test_shards_are_found_in_a_folder_and_by_the_info_file(shards: Path) -> None:
    (shards / "val").mkdir()
    for number in ("0", "1"):
        (shards / f"tiny-validation-000{number}.tar").rename(shards / "val" / f"{number}.tar")
    info = {"train": {"name": "train", "filenames": ["tiny-train-0001.tar"], "shard_lengths": [12], "num_samples": 12}}
    (shards / "_info.json").write_text(json.dumps({"splits": info}))
    train, evaluation = build_datasets(config(shards))
    assert (len(train), len(evaluation)) == (12, 7)


@pytest.mark.parametrize("extension", ["jpeg", "webp"])
def test_shards_may_hold_other_images_and_further_members(tmp_path: Path, extension: str) -> None:
    content = {"README": b"a note", "a/1.txt": b"a caption", f"a/1.{extension.upper()}": png(7, extension)}
    write_tar(tmp_path / "train.tar", {**content, "a/1.cls": b"1\n", "a/._1.cls": b"by macOS"})
    assert [label for _, label in greys(build_dataset(config(tmp_path), training=True))] == [1]


def test_class_tars_are_numbered_as_timm_does(class_tars: Path) -> None:
    cfg = config(class_tars, "imagenet")
    train, evaluation = build_datasets(cfg)
    assert {type(train), type(evaluation)} == {TarDataset}
    for dataset, root in ((train, class_tars / "train"), (evaluation, class_tars / "validation.tar")):
        reader = ReaderImageInTar(str(root))
        assert dataset.class_to_idx == reader.class_name_to_idx == {"n2": 0, "n10": 1}  # type: ignore[attr-defined]
        theirs = [
            (int(np.asarray(Image.open(file))[0, 0, 0]), int(label))
            for file, label in map(reader.__getitem__, range(len(reader)))
        ]
        assert Counter(greys(dataset)) == Counter(theirs)
        for state in [reader.tar_state] if reader.root_is_tar else reader.tar_state.values():
            state.tf.close()


def test_a_tar_of_tars_is_read_in_place(tmp_path: Path) -> None:
    inner = {name: write_tar(tmp_path / f"{name}.tar", {f"{i}.png": png(i + add) for i in range(3)})
             for name, add in (("cat", 0), ("dog", 9))}  # fmt: skip
    write_tar(tmp_path / "train.tar", {f"{name}.tar": file.read_bytes() for name, file in inner.items()})
    dataset = build_dataset(config(tmp_path, "folder"), training=True)
    assert greys(dataset) == [(0, 0), (1, 0), (2, 0), (9, 1), (10, 1), (11, 1)]


def test_large_valid_reads_tars_and_shards(shards: Path) -> None:
    dataset = build_dataset(config(shards, large_valid=True, pooling_stat="1111"), training=False)
    assert torch.as_tensor(dataset[0][0]).shape == (3, 288, 288)


# --- the index on disk -----------------------------------------------------------------------------------


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda files, layout: built.append(1) or build(files, layout))
    cfg = config(shards)
    for _ in range(2):
        assert len(build_dataset(cfg, training=True)) == 23
    assert len(built) == 1
    shard = write_tar(shards / "tiny-train-0001.tar", samples(11, 5))
    assert greys(build_dataset(cfg, training=True)) == [(i, i % 2) for i in range(16)]
    os.utime(shard, ns=(1, 1))  # other content of the same size
    build_dataset(cfg, training=True)
    assert len(built) == 3
    (index,) = shards.glob(".tar-index-*.npz")
    index.write_bytes(index.read_bytes()[:-100])
    assert len(build_dataset(cfg, training=True)) == 16
    assert len(built) == 4
    assert not list(shards.glob(".*.partial"))


def test_the_index_goes_to_the_cache_folder_where_the_data_is_read_only(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    store = index_module._store

    def refuse(index: Any, place: Path, key: str) -> None:
        if place.parent == shards:
            raise PermissionError("Read-only file system")
        store(index, place, key)

    monkeypatch.setattr(index_module, "_store", refuse)
    first = greys(build_dataset(config(shards), training=True))
    assert len(list(cache.rglob("tar-index-*.npz"))) == 1
    monkeypatch.setattr(index_module, "_build", None)  # not called again
    assert greys(build_dataset(config(shards), training=True)) == first


# --- exactly once, and resumable -------------------------------------------------------------------------


def loaders(root: Path, rank: int = 0, world_size: int = 1, **settings: Any) -> Loaders:
    cfg = config(root, batch_size=4, val_batch_size=2, vflip=0.5, **settings)
    return build_loaders(cfg, device=CPU, rank=rank, world_size=world_size)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_sample_of_the_shards_once(shards: Path, world_size: int, workers: int) -> None:
    batches = [batch for rank in range(world_size) for batch in loaders(shards, rank, world_size, workers=workers).eval]
    means = torch.cat([images.mean((1, 2, 3)) for images, _ in batches])
    expected = torch.cat([images.mean((1, 2, 3)) for images, _ in loaders(shards).eval])
    assert len(expected.unique()) == 7
    assert torch.equal(means.sort().values, expected)
    assert Counter(torch.cat([targets for _, targets in batches]).tolist()) == {0: 4, 1: 3}


@pytest.mark.parametrize("world_size", [1, 2])
def test_digits_in_shards_give_the_batches_of_the_embedded_digits(tmp_path: Path, world_size: int) -> None:
    for train in (True, False):
        digits = DigitsDataset(DIGITS_FILE, train=train)
        for shard in range(3):
            content: Content = {}
            for i in range(shard * len(digits) // 3, (shard + 1) * len(digits) // 3):
                image, label = digits[i]
                file = io.BytesIO()
                image.save(file, format="png")
                content |= {f"{i:04}.png": file.getvalue(), f"{i:04}.cls": str(label).encode()}
            write_tar(tmp_path / f"{'train' if train else 'val'}-{shard}.tar", content)
    settings = {"num_classes": 10, "in_channels": 1, "img_size": 16, "mean": [0.3050], "std": [0.3765], "crop_pct": 1.0,
                "hflip": 0.0, "aa": "rand-m9-n1", "batch_size": 100, "val_batch_size": 99, "workers": 0}  # fmt: skip
    both = [
        build_loaders(config_from({**settings, **where}), device=CPU, rank=world_size - 1, world_size=world_size)
        for where in ({"dataset": "wds/digits", "data_dir": str(tmp_path)}, {"dataset": "digits"})
    ]
    for ours, theirs in zip(*([*built.train, *built.eval] for built in both), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_shards_continues_in_its_middle(shards: Path, rank: int, workers: int) -> None:
    built = loaders(shards, rank, 2, workers=workers)
    built.set_epoch(3)
    whole = list(built.train)
    built = loaders(shards, rank, 2)
    built.set_epoch(3, start_batch=1)
    rest = list(built.train)
    assert (len(whole), len(rest)) == (2, 1)
    assert torch.equal(whole[1][0], rest[0][0])
    assert torch.equal(whole[1][1], rest[0][1])


# --- errors ----------------------------------------------------------------------------------------------


def cut(file: Path, at: int) -> None:
    file.write_bytes(file.read_bytes()[:at])


def test_a_shard_cut_within_an_image_or_between_two_is_refused(shards: Path) -> None:
    shard = shards / "tiny-train-0001.tar"
    with tarfile.open(shard) as tar:
        middle = tar.getmembers()[4].offset_data + 10
        between = tar.getmembers()[4].offset
    for place in (between, middle, 300, 0):
        content = shard.read_bytes()
        cut(shard, place)
        with pytest.raises(UserError, match=r"^data_dir: .*/tiny-train-0001.tar is cut short, damaged or compressed"):
            build_dataset(config(shards), training=True)
        shard.write_bytes(content)


def test_a_broken_header_in_the_middle_is_refused(shards: Path) -> None:
    shard = shards / "tiny-train-0000.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        content[tar.getmembers()[6].offset + 150] ^= 0xFF  # its checksum
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"tiny-train-0000.tar is cut short, damaged .*no end mark at byte"):
        build_dataset(config(shards), training=True)


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"train.tar is cut short, damaged or compressed"):
        build_dataset(config(tmp_path), training=True)


ONE = {"1.png": png(1), "1.cls": b"1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {**ONE, "2.png": png(2)},
            "train.tar: sample '2' has no label; expected 2.cls with the class index, or 2.json",
        ),
        ({**ONE, "2.cls": b"1"}, "train.tar: sample '2' has 0 images; expected one of 2.jpg, 2.jpeg, 2.png, 2.webp"),
        ({**ONE, "1.jpg": png(2)}, "train.tar: sample '1' has 2 images; expected one of"),
        ({**ONE, "1.PNG": png(2)}, "train.tar: sample '1' has two .png; keys must differ"),
        ({**ONE, "1.cls": b"dog"}, "train.tar: 1.cls holds 'dog'; expected a class index"),
        ({**ONE, "1.cls": b"\xff"}, "train.tar: 1.cls holds '.'; expected a class index"),
        (
            {"1.png": png(1), "1.json": b'{"caption": 1}'},
            r"1.json holds .*; expected an object with .* as label or cls",
        ),
        ({"1.png": png(1), "1.json": b'{"label": [1]}'}, "1.json holds .*; expected an object"),
        ({"1.png": png(1), "1.json": b'{"label": 0.7}'}, "1.json holds .*; expected an object"),
        ({"1.png": png(1), "1.json": b"[]"}, "1.json holds '..'; expected an object"),
        ({**ONE, "1.cls": b"2"}, r"train.tar/1: class index 2 does not fit num_classes 2 \(valid: 0 to 1\); set num_"),
        ({**ONE, "1.cls": b"-1"}, "train.tar/1: class index -1 does not fit num_classes 2"),
        ({"README": b"a note"}, r"train.tar holds no images \(jpg, jpeg, png, webp\)"),
    ],
)
def test_shards_that_do_not_hold_samples_are_refused(tmp_path: Path, content: Content, message: str) -> None:
    write_tar(tmp_path / "train.tar", content)
    with pytest.raises(UserError, match=message) as caught:
        build_dataset(config(tmp_path), training=True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.npz")) or "class index" in message  # a broken one leaves no index


def test_fewer_classes_than_the_model_has_are_warned_of(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_dataset(config(shards, num_classes=10), training=True)
    assert "num_classes is 10, the labels of train_split 'train' go up to 1 only" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "holdout"}, "train_split: no shards of 'holdout' in .*; expected .*/holdout/"),
        ({"train_split": "tiny-train-{0000..0002}.tar"}, "train_split: .*/tiny-train-0002.tar does not exist; copy it"),
        ({"train_split": "tiny-train-{0..1}.tar"}, "train_split: .*/tiny-train-0.tar does not exist"),
        ({"train_split": "none-*.tar"}, r"train_split: .*/none-\*.tar does not exist"),
        ({"data_dir": "/nowhere"}, "data_dir: /nowhere is no folder; expected WebDataset shards"),
        ({"data_dir": ""}, "data_dir: dataset 'wds/tiny' has no default folder; give --data-dir"),
    ],
)
def test_shards_that_are_not_there_are_named(shards: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_dataset(config(shards, **settings), training=True)


@pytest.mark.parametrize(
    ("files", "count", "message"),
    [
        (["tiny-train-0000.tar"], 99, "names 99 samples of 'train', its 1 shards hold 11; copy the shards again"),
        (["other.tar"], 1, "_info.json, split train: .*/other.tar does not exist"),
        (["tiny-train-0000.tar"] * 2, 22, "_info.json, split train: .*/tiny-train-0000.tar is listed twice"),
        (
            None,
            1,
            r"_info.json: splits\.train\.filenames is None: it should be a .*; expected splits: <name>: filenames",
        ),
    ],
)
def test_an_info_file_that_does_not_fit_the_shards(shards: Path, files: Any, count: int, message: str) -> None:
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": files, "num_samples": count}}}))
    with pytest.raises(UserError, match=message):
        build_dataset(config(shards), training=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_of_a_shard_is_named_in_one_line(shards: Path, workers: int) -> None:
    write_tar(shards / "tiny-validation-0001.tar", {**samples(103, 1), "x.png": png(1)[:60], "x.cls": b"0"})
    earlier = multiprocessing.active_children()
    with pytest.raises(UserError, match=r"^data_dir: [^\n]*/tiny-validation-0001.tar/x is damaged [^\n]*remove it$"):
        list(loaders(shards, workers=workers).eval)
    assert set(multiprocessing.active_children()) <= set(earlier)  # each left one costs 10 seconds


def test_a_shard_that_shrinks_while_it_is_read_is_refused(shards: Path) -> None:
    dataset = build_dataset(config(shards), training=True)
    cut(shards / "tiny-train-0001.tar", 600)
    with pytest.raises(UserError, match=r"tiny-train-0001.tar/00022: the tar became shorter"):
        dataset[22]


def test_an_image_outside_any_class_folder_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", {"1.png": png(1)})
    with pytest.raises(UserError, match=r"train.tar: image '1.png' lies in no class folder; expected <class>/<image>"):
        build_dataset(config(tmp_path, "folder"), training=True)


def test_the_classes_of_tars_are_compared_between_splits(class_tars: Path) -> None:
    write_tar(class_tars / "validation.tar", {"n2/1.png": png(1), "n3/1.png": png(1)})
    with pytest.raises(UserError, match="splits 'train' and 'validation' have different class folders"):
        build_datasets(config(class_tars, "imagenet"))


# --- links, and labels of any size -----------------------------------------------------------------------


def write_links(file: Path, content: Content, links: dict[str, tuple[bytes, str]]) -> Path:
    """A tar of `content`, after which come `links`: name -> kind of tarfile, target."""
    write_tar(file, content)
    with tarfile.open(file, "a") as tar:
        for name, (kind, target) in links.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            tar.addfile(entry)
    return file


def test_links_in_a_tar_are_the_files_they_stand_for(tmp_path: Path) -> None:
    links = {
        "dog/hard.png": (tarfile.LNKTYPE, "./cat/1.png"),  # a hard link names a member
        "dog/soft.png": (tarfile.SYMTYPE, "../cat/2.png"),  # a symbolic link is a path from its folder
        "dog/both.png": (tarfile.SYMTYPE, "hard.png"),
        "LICENSE": (tarfile.SYMTYPE, "../../LICENSE"),  # no data: it may point nowhere
    }
    write_links(tmp_path / "train.tar", {f"cat/{i}.png": png(i) for i in (1, 2)}, links)
    dataset = build_dataset(config(tmp_path, "folder"), training=True)
    assert greys(dataset) == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 1)]


def test_links_in_shards_and_inner_tars_are_followed(tmp_path: Path) -> None:
    write_links(tmp_path / "train.tar", {**ONE, "2.cls": b"0"}, {"2.png": (tarfile.LNKTYPE, "1.png")})
    assert greys(build_dataset(config(tmp_path), training=True)) == [(1, 1), (1, 0)]
    inner = write_links(tmp_path / "dog.tar", {"1.png": png(5)}, {"2.png": (tarfile.LNKTYPE, "1.png")})
    write_tar(tmp_path / "a" / "train.tar", {"dog.tar": inner.read_bytes(), "cat/1.png": png(9)})
    assert greys(build_dataset(config(tmp_path / "a", "folder"), training=True)) == [(5, 1), (5, 1), (9, 0)]


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        (
            tarfile.SYMTYPE,
            "../../elsewhere.png",
            r"dog/2\.png is a link to '\.\./\.\./elsewhere\.png', which is no file",
        ),
        (
            tarfile.LNKTYPE,
            "cat/9.png",
            "dog/2.png is a link to 'cat/9.png', which is no file in this tar; make the tar",
        ),
        (tarfile.SYMTYPE, "2.png", "dog/2.png is a link to '2.png', which is no file in this tar"),  # itself
        (tarfile.SYMTYPE, "../cat", "dog/2.png is a link to '../cat', which is a folder"),
        (tarfile.FIFOTYPE, "", "dog/2.png is a device or a pipe"),
    ],
)
def test_an_image_that_is_a_link_to_nothing_is_not_left_out(
    tmp_path: Path, kind: bytes, target: str, message: str
) -> None:
    write_links(tmp_path / "train.tar", {"cat/1.png": png(1), "dog/1.png": png(2)}, {"dog/2.png": (kind, target)})
    with pytest.raises(UserError, match=message):
        build_dataset(config(tmp_path, "folder"), training=True)


@pytest.mark.parametrize("label", [b"1" * 20, b"1" * 5000, b"1_0", b"\xd9\xa1", b"0x1", b"1e3"])
def test_a_label_that_is_no_class_index_is_refused(tmp_path: Path, label: bytes) -> None:
    write_tar(tmp_path / "train.tar", {**ONE, "1.cls": label})
    with pytest.raises(UserError, match=r"1\.cls holds '.*'; expected a class index"):
        build_dataset(config(tmp_path), training=True)


@pytest.mark.parametrize(
    "label", [b'{"label": ' + b"[" * 10**5, b'{"label": 1e400}', b'{"label": null}', b'{"label": ' + b"1" * 5000]
)
def test_a_label_of_json_that_is_no_class_index_is_refused(tmp_path: Path, label: bytes) -> None:
    write_tar(tmp_path / "train.tar", {"1.png": png(1), "1.json": label})
    with pytest.raises(UserError, match=r"1\.json holds .*; expected an object with a class index"):
        build_dataset(config(tmp_path), training=True)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("x-{5..0}.tar", "does not count up from 5 to 0"),
        ("x-{0..99999999999}.tar", "x-0.tar does not exist"),
        ("x-{0.." + "9" * 200 + "}.tar", "does not count up from 0 to 999.*of at most 12 digits"),
        ("{0..99999999}{0..99999999}{0..99999999}.tar", "does not exist"),
    ],
)
def test_a_pattern_of_endless_shards_ends(shards: Path, split: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^train_split: .*{message}"):
        build_dataset(config(shards, train_split=split), training=True)


INFO = {"splits": {"train": {"filenames": ["tiny-train-0000.tar"], "num_samples": 11}}}


@pytest.mark.parametrize("seed", range(40))
def test_an_info_file_of_any_content_is_one_message(shards: Path, seed: int) -> None:
    draw = random.Random(seed)
    garbage = [None, True, 1, -1, 1.5, float("inf"), "text", [], [1], {}, 10**4000, [[]], {"a": {}}]
    info: Any = json.loads(json.dumps(INFO))
    place = draw.choice([("splits",), ("splits", "train"), ("splits", "train", "filenames"),
                         ("splits", "train", "num_samples")])  # fmt: skip
    holder = info
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value = draw.choice(garbage)
    if value == {} and place == ("splits",):
        return
    (shards / "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"_info\.json: splits") as caught:
        build_dataset(config(shards), training=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "null", "3", "[", "[" * 10**5, '{"splits": NaN}', "\x00"])
def test_an_info_file_that_is_no_json_is_one_message(shards: Path, text: str) -> None:
    (shards / "_info.json").write_text(text)
    with pytest.raises(UserError, match=r"data_dir: .*/_info\.json.*; expected splits: <name>: filenames"):
        build_dataset(config(shards), training=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tar": np.array([7] * 23, np.int32)},
        {"offset": np.array([-1] * 23)},
        {"size": np.array([10**12] * 23)},
        {"label": np.zeros((23, 1), np.int64)},
        {"name": np.array([b"a"])},
        {"size": np.array([0.5] * 23)},
        {"label": np.array(["x"] * 23)},
    ],
)
def test_an_index_with_other_arrays_is_made_again(shards: Path, wrong: dict[str, np.ndarray]) -> None:
    build_dataset(config(shards), training=True)
    (place,) = shards.glob(".tar-index-*.npz")
    with np.load(place) as content:
        arrays = {name: content[name] for name in content.files}
    np.savez(place, **(arrays | wrong))
    assert greys(build_dataset(config(shards), training=True)) == [(i, i % 2) for i in range(23)]
