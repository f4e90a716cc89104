"""Files of data: events, `.pt` frames, images, tars, shard lists, lists of samples, and the small files beside them."""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.fuzzing.cases import Case, generator
from tests.fuzzing.values import anything, as_json, shortened
from utils.data.images import decode
from utils.data.sample_list import listed_samples
from utils.data.tars import TarDataset, open_shards
from utils.events.dataset import FramesReader
from utils.events.files import read_events, read_record
from utils.events.sources import _Prepared
from utils.events.splits import Sample
from utils.events.tet import _Labels, read_tet

_SIDE = 32
_FORMATS = ("bmp", "dds", "gif", "ico", "jpeg", "pcx", "png", "ppm", "sgi", "tga", "tiff", "webp")


def _spoiled(rng: random.Random, content: bytes) -> bytes:
    """Bytes with some changed, or cut off."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found[: rng.choice((len(found), len(found), rng.randrange(len(found))))])


def _events(rng: random.Random) -> dict[str, np.ndarray]:
    draw = np.random.RandomState(rng.randrange(2**31))
    return {
        "t": np.sort(draw.randint(0, 10**6, 50)),
        **{name: draw.randint(0, most, 50) for name, most in (("x", _SIDE), ("y", _SIDE), ("p", 2))},
    }


@generator("events")
def event_file(rng: random.Random, folder: Path) -> Case:
    """Arrays of another length, type or range; bytes changed."""
    arrays: dict[str, Any] = _events(rng)
    name, kind = (
        rng.choice("txyp"),
        rng.choice(("value", "length", "2-D", "text", "missing", "bytes", "object", "none")),
    )
    valid: bool | None = False
    if kind == "value":
        arrays[name] = arrays[name].astype(float)
        arrays[name][rng.randrange(50)] = rng.choice((0.5, -1.5, float("nan"), float("inf"), 1e300))
    elif kind == "length":
        arrays[name] = arrays[name][: rng.randrange(50)]
    elif kind == "2-D":
        arrays[name] = arrays[name].reshape(2, 25)
    elif kind == "text":
        arrays[name] = arrays[name].astype(str)
    elif kind == "missing":
        del arrays[name]
    elif kind == "object":
        arrays[name] = np.array([None] * 50, dtype=object)
    else:
        valid = None if kind == "bytes" else True
    np.savez_compressed(folder / "a.npz", **arrays)
    if kind == "bytes":
        (folder / "a.npz").write_bytes(_spoiled(rng, (folder / "a.npz").read_bytes()))
    return Case(f"events, {name}: {kind}", functools.partial(read_events, Path("a.npz"), _SIDE), ("a.npz",), valid)


@generator("frames")
def frame_file(rng: random.Random, folder: Path) -> Case:
    """Frames below 0, without value, of another shape or type; `.pt` frames with any content or label."""
    if rng.random() < 0.5:
        value: Any = rng.choice((-1.0, float("nan"), float("inf")))
        frames = np.zeros((4, 2, _SIDE, _SIDE))
        frames[rng.randrange(4), 0, 3, 3] = value
        frames = rng.choice((frames, np.zeros((3, 2, _SIDE, _SIDE)), np.zeros((4, 2, _SIDE, _SIDE), np.complex64)))
        np.savez(folder / "a.npz", frames=frames)
        reader = FramesReader(Path(), 4, _SIDE)
        return Case("frames", functools.partial(reader, Sample("a.npz", 0)), ("a.npz",), False)
    counts = torch.ones(2, 8, 8, 4)
    label = rng.choice((None, -1, 10, 0.5, "3", True, torch.tensor([]), torch.tensor([1, 2]), float("nan"), 10**30))
    wrong = rng.choice(
        (-counts, counts[0], counts * float("nan"), counts.to_sparse(), counts.to(torch.complex64), None)
    )
    content: Any = rng.choice(([counts, label], [wrong, 0], "text", None, [], {"a": counts}, [counts]))
    torch.save(content, folder / "0.pt")
    return Case(f".pt frames, label {label!r:.40}", functools.partial(read_tet, Path("0.pt")), ("0.pt",), False)


@generator("images")
def image_file(rng: random.Random, folder: Path) -> Case:
    """Images with bytes changed."""
    kind = rng.choice(_FORMATS)
    file = io.BytesIO()
    pixels = np.random.RandomState(rng.randrange(2**31)).randint(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, format=kind)
    content = _spoiled(rng, file.getvalue())
    return Case(f"an image, {kind}", lambda: decode(io.BytesIO(content), "RGB", f"a.{kind}"), (f"a.{kind}",))


def _tar(rng: random.Random, file: Path, label: bytes) -> None:
    image = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(image, format="png")
    with tarfile.open(file, "w") as tar:
        for i in range(3):
            for name, data in ((f"{i}.png", image.getvalue()), (f"{i}.cls", label if i == 1 else b"1")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        if rng.random() < 0.3:
            entry = tarfile.TarInfo(rng.choice(("3.png", "note", "4.cls")))
            entry.type = rng.choice((tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE))
            entry.linkname = rng.choice(("0.png", "../x", entry.name, ""))
            tar.addfile(entry)


@generator("shards")
def shards(rng: random.Random, folder: Path) -> Case:
    """Labels, tars and patterns of any content, and what _info.json says of them."""
    label = rng.choice((b"1", b"1", b"1" * 20, b"9" * 5000, b"-1", b"1.5", b"nan", b"", b"\xff", b"1_0", b"true"))
    _tar(rng, folder / "train-0.tar", label)
    kind, split = rng.choice(("label", "bytes", "info", "pattern")), "train"
    if kind == "bytes":
        (folder / "train-0.tar").write_bytes(_spoiled(rng, (folder / "train-0.tar").read_bytes()))
    elif kind == "info":
        info: Any = {"splits": {"train": {"filenames": ["train-0.tar"], "num_samples": 3}}}
        value = anything(rng)
        where = rng.choice(("", "splits", "train", "filenames", "num_samples"))
        if not where:
            info = value
        else:
            holder = info
            while where not in holder:
                holder = next(iter(holder.values()))
            holder[where] = value
        (folder / "_info.json").write_text(as_json(info))
    elif kind == "pattern":
        split = rng.choice(
            ("{5..0}.tar", "{0..99999999999}.tar", "x-{" + "9" * 5000 + "..1}.tar", "[.tar", "*.tar", "{a..b}.tar")
        )

    def read() -> None:
        data: TarDataset = open_shards(Path(), [split], key="train_split", classes=2, mode="RGB")
        for i in range(len(data)):
            data[i]

    return Case(f"shards, {kind}", read, ("train-0.tar", "_info.json", "train_split", "data_dir"))


class _Named:
    def __len__(self) -> int:
        return 9

    def sample_name(self, index: int) -> str:
        return f"cat/{index}.png"


@generator("lists", share=0.5)
def sample_list(rng: random.Random, folder: Path) -> Case:
    """Lists of samples with lines that name none."""
    odd = [
        "9",
        "-1",
        "9" * 5000,
        "1.5",
        "cat/9.png",
        "\x00",
        "²",
        "٣",
        "a" * 10**5,
        "1e3",
        "nan",
        "\ufeff1",
        "../cat/1.png",
    ]
    lines = [*map(str, rng.sample(range(9), 3)), rng.choice(odd)]
    rng.shuffle(lines)
    (folder / "list.txt").write_text("\n".join(lines))
    call = functools.partial(listed_samples, rng.choice((_Named(), range(9))), Path("list.txt"))
    return Case(f"a list with {shortened(lines)}", call, ("list.txt",), None if "٣" in lines else False)


@generator("records", share=0.5)
def record(rng: random.Random, folder: Path) -> Case:
    """prepared.json and tet_labels.json with any value in any place."""
    schema: Any
    schema, name, content = rng.choice(
        (
            (_Prepared, "prepared.json", {"dataset": "cifar10-dvs", "samples": {"cat": 3}}),
            (_Labels, "tet_labels.json", {"complete": True, "made": False, "labels": {"train": [1], "test": [2]}}),
        )
    )
    key, value = rng.choice(list(content)), anything(rng)
    written: Any = content | {key: value} if rng.random() < 0.8 else value
    text = as_json(written)
    text = (
        text if rng.random() < 0.8 else rng.choice(("", "[" * 10**5, text[: len(text) // 2], json.dumps(content) + "x"))
    )
    (folder / name).write_text(text)
    return Case(f"{name}, {key}: {shortened(value)}", lambda: read_record(schema, Path(name)), (name,))
