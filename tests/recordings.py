"""Tiny recordings in the real formats, written byte by byte, and the archives that hold them."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from utils.events.sensor import Events
from utils.events.sources import SOURCES
from utils.events.splits import Sample

CLASSES = SOURCES["cifar10-dvs"].classes
URL = "https://example.org/"


def some_events(count: int, seed: int = 0, start: int = 1000) -> Events:
    generator = np.random.RandomState(seed)
    events = {key: generator.randint(0, limit, count) for key, limit in (("x", 128), ("y", 128), ("p", 2))}
    return {"t": start + np.arange(count) * 10, **events}


def aedat2(events: Events) -> bytes:
    """AEDAT 2.0 as CIFAR10-DVS has it: big-endian pairs; axes mirrored and swapped, polarity bit 1 for OFF."""
    content = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n"
    for t, x, y, p in zip(*(events[key].tolist() for key in "txyp"), strict=True):
        content += struct.pack(">II", (127 - x) << 8 | (127 - y) << 1 | (1 - p), t)
    return content


def aedat31(events: Events, packet: int = 50) -> bytes:
    """AEDAT 3.1 as Gesture has it: little-endian packets of polarity events, and one packet of another type."""
    content = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"
    rows = list(zip(*(events[key].tolist() for key in "txyp"), strict=True))
    content += struct.pack("<HHIIIIII", 0, 1, 8, 4, 0, 1, 1, 1) + bytes(8)
    for first in range(0, len(rows), packet):
        part = rows[first : first + packet]
        content += struct.pack("<HHIIIIII", 1, 1, 8, 4, part[0][0] >> 31, len(part), len(part), len(part))
        for t, x, y, p in part:
            content += struct.pack("<II", x << 17 | y << 2 | p << 1 | 1, t & 0x7FFFFFFF)
    return content


def write_cifar10_dvs(root: Path, per_class: int = 3, events: int = 60) -> list[tuple[str, str, str]]:
    """The ten archives in `root/download`; returns their names, addresses and MD5."""
    (root / "download").mkdir(parents=True)
    for label, name in enumerate(CLASSES):
        with zipfile.ZipFile(root / "download" / f"{name}.zip", "w") as file:
            for i in range(per_class):
                content = aedat2(some_events(events + i, seed=100 * label + i))
                file.writestr(f"{name}/cifar10_{name}_{i}.aedat", content)
    return _resources(root)


def write_gesture(root: Path, events: int = 240) -> list[tuple[str, str, str]]:
    """One recording to train and one to test, each with all eleven gestures, the twelfth row repeats class 8."""
    (root / "download").mkdir(parents=True)
    labels = [*range(1, 12), 8]
    step = events * 10 // len(labels)
    rows = [f"{label},{1000 + i * step},{1000 + (i + 1) * step}" for i, label in enumerate(labels)]
    files = {"trials_to_train.txt": b"user01_lab.aedat\n", "trials_to_test.txt": b"user24_led.aedat\n\n"}
    for seed, name in enumerate(("user01_lab", "user24_led")):
        files[f"{name}.aedat"] = aedat31(some_events(events, seed))
        files[f"{name}_labels.csv"] = "\n".join(["class,startTime_usec,endTime_usec", *rows, ""]).encode()
    with tarfile.open(root / "download" / "DvsGesture.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"DvsGesture/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (root / "download" / "LICENSE.txt").write_text("CC BY 4.0")
    return _resources(root)


def _resources(root: Path) -> list[tuple[str, str, str]]:
    files = sorted((root / "download").iterdir())
    return [(path.name, URL + path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in files]


def names(samples: list[Sample]) -> list[str]:
    return [sample.path for sample in samples]
