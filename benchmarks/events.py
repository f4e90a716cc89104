"""Event data: what opening, reading and augmenting cost, as ratios against the plain way in the same run.

    python -m benchmarks.events            (about a minute on two cores)

| row | A (this project) | B |
|---|---|---|
| open | split 10,000 samples by file names | SpikingJelly's split, which loads each sample for its label |
| aedat2 | decode a recording with NumPy | event by event in Python |
| aedat31 | decode a recording with NumPy | SpikingJelly's reader |
| frames | read frames stored as bytes | read the same frames as SpikingJelly stores them, as doubles |
| affine | one torchvision call for all T frames | one call per frame |

A and B take turns; times are medians, on one thread, as in a loader process. `files` counts the sample files opened.
The last line is JSON.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms import functional as F

from benchmarks.measure import noting_failure, print_json
from utils.config.settings import Config
from utils.data.mixing import EventMix
from utils.events.aedat import read_cifar10_dvs, read_gesture
from utils.events.augment import drop_events, frame_operations
from utils.events.files import frames_folder, integrate, list_samples, read_npz, spikingjelly_datasets, write_npz
from utils.events.splits import split_by_name
from utils.npz import REAL

CLASSES, PER_CLASS, T, SIDE = [f"class{i}" for i in range(10)], 1000, 10, 128
opened: list[str] = []


def median_times(a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of `a` and `b`, run in turns after one round that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for run, kept in ((a, times[0]), (b, times[1])):
            started = time.perf_counter()
            run()
            if turn:
                kept.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def opening(root: Path) -> dict[str, Any]:
    """Split the set by names, and by loading each sample."""
    folder = root / frames_folder(T)
    events = {"t": np.arange(20_000), "p": np.arange(20_000) % 2}
    frames = None
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            if frames is None:
                places = {axis: np.random.RandomState(0).randint(0, SIDE, 20_000) for axis in "xy"}
                frames = integrate(events | places, T, SIDE, folder)
                write_npz(folder / name / f"{i}.npz", {"frames": frames})
            else:
                os.link(folder / CLASSES[0] / "0.npz", folder / name / f"{i}.npz")
    sj = spikingjelly_datasets()

    def by_names() -> int:
        return len(split_by_name(list_samples(folder, CLASSES), CLASSES, "first90").train)

    def by_loading() -> int:
        from torchvision.datasets import DatasetFolder

        data = DatasetFolder(str(folder), sj.load_npz_frames, (".npz",))
        with contextlib.redirect_stderr(io.StringIO()):
            return len(sj.split_to_train_test_set(0.9, data, len(CLASSES))[0])

    assert by_names() == by_loading()
    counts = []
    for run in (by_names, by_loading):
        opened.clear()
        run()
        counts.append(len(opened))
    a, b = median_times(by_names, by_loading, 3)
    return {
        "row": "open",
        "samples": len(CLASSES) * PER_CLASS,
        "files_a": counts[0],
        "files_b": counts[1],
        "a": a,
        "b": b,
    }


def decoding(root: Path) -> list[dict[str, Any]]:
    """One recording of each format."""
    count = 50_000
    words = np.random.RandomState(0).randint(0, 2**15, (count, 2))
    old, new = root / "old.aedat", root / "new.aedat"
    old.write_bytes(b"#!AER-DAT2.0\r\n" + words.astype(">u4").tobytes())
    header = struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, count, count, count)
    new.write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + header + words.astype("<u4").tobytes())

    def one_by_one() -> int:
        content = old.read_bytes()[14:]
        found = []
        for address, t in struct.iter_unpack(">II", content):
            found.append((t, 127 - (address >> 8 & 127), 127 - (address >> 1 & 127), 1 - (address & 1)))
        return len(np.array(found))

    rows = []
    for name, ours, other in (
        ("aedat2", lambda: read_cifar10_dvs(old), one_by_one),
        ("aedat31", lambda: read_gesture(new), lambda: spikingjelly_datasets().load_aedat_v3(str(new))),
    ):
        a, b = median_times(ours, other, 5)
        rows.append({"row": name, "events": count, "a": a, "b": b})
    return rows


def frame_files(root: Path) -> dict[str, Any]:
    """One file of frames, as bytes and as doubles."""
    ours = root / frames_folder(T) / CLASSES[0] / "0.npz"
    theirs = root / "doubles.npz"
    np.savez_compressed(theirs, frames=read_npz(ours, {"frames": REAL})["frames"].astype(np.float64))
    sj = spikingjelly_datasets()
    a, b = median_times(
        lambda: read_npz(ours, {"frames": REAL})["frames"].astype(np.float32),
        lambda: sj.load_npz_frames(str(theirs)),
        20,
    )
    return {"row": "frames", "bytes_a": ours.stat().st_size, "bytes_b": theirs.stat().st_size, "a": a, "b": b}


def augmenting() -> list[dict[str, Any]]:
    """Rotation of all frames at once and one by one; and the throughput of every augmentation."""
    frames = torch.randint(0, 5, (T, 2, 64, 64)).float()
    rows: list[dict[str, Any]] = []
    affine = dict(angle=10.0, translate=[0, 0], scale=1.0, shear=[5.0, 0.0])
    a, b = median_times(
        lambda: F.affine(frames, **affine), lambda: torch.stack([F.affine(frame, **affine) for frame in frames]), 100
    )
    rows.append({"row": "affine", "a": a, "b": b})
    chosen: dict[str, Any] = {
        "event_hflip": 1.0,
        "event_roll": 5,
        "event_rotate": 30.0,
        "event_shear": 0.3,
        "dvs_aug": True,
        "dvs_trival_aug": True,
    }
    for name, value in chosen.items():
        (operation,) = frame_operations(Config(dataset="gesture", **{name: value}))
        a, _ = median_times(lambda run=operation: run(frames), lambda: None, 100)  # type: ignore[misc]
        rows.append({"row": name, "samples_per_second": round(1 / a), "a": a})
    events = {axis: np.random.RandomState(0).randint(0, SIDE, 20_000) for axis in "xy"}
    events |= {"t": np.arange(20_000), "p": np.arange(20_000) % 2}
    a, _ = median_times(lambda: drop_events(events, SIDE, T), lambda: None, 100)
    rows.append({"row": "event_drop", "samples_per_second": round(1 / a), "a": a})
    batch, labels, mix = torch.rand(16, T, 2, 64, 64), torch.arange(16) % 10, EventMix(1.0, 10, 0.1)
    a, _ = median_times(lambda: mix(batch, labels), lambda: None, 5)
    rows.append({"row": "event_mix", "samples_per_second": round(16 / a), "a": a})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if event == "open" and str(args[0]).endswith(".npz") else None
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "open": lambda: [opening(root)],
            "aedat": lambda: decoding(root),
            "frames": lambda: [frame_files(root)],
            "augmentations": augmenting,
        }
        for name, rows_of in parts.items():
            with noting_failure(failed, name):
                rows += rows_of()
    for name, reason in failed.items():
        print(f"row {name}  failed: {reason}")
    for row in rows:
        if "b" in row:
            row["ratio"] = round(row["b"] / row["a"], 1)
        print(
            "  ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    print_json("benchmarks.events", {"rows": rows}, failed=failed)


if __name__ == "__main__":
    main()
