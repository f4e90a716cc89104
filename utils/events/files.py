"""The files of event data: one npz of events per sample, and one of frames integrated from it.

Folders and files are those of SpikingJelly, so that each can use what the other has made:
`events_np/[<split>/]<class>/<sample>.npz` holds t, x, y, p; `frames_number_<T>_split_by_number/` mirrors it and holds
`frames` [T, 2, H, W], OFF before ON. The integration is SpikingJelly's. Each file is written whole or not at all, so an
interrupted conversion continues where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from utils.errors import UserError, first_line
from utils.files import open_regular, replacing
from utils.npz import REAL, read_arrays
from utils.schema import read_json

T = TypeVar("T")

EVENTS = "events_np"
_TYPES = {"t": np.int64, "x": np.int16, "y": np.int16, "p": np.int8}  # as they are stored
_RANGES = {"t": (-(2**62), 2**62), "p": (0, 1)}
_AGAIN = "delete it and run python -m utils.prepare again"
# Seconds: how long one process works before it estimates the rest, and how long a rest is given to several processes.
_TRIAL, _WORTH_PROCESSES = 2.0, 20.0


def frames_folder(time_steps: int) -> str:
    """SpikingJelly's name of the folder of frames with equal numbers of events."""
    return f"frames_number_{time_steps}_split_by_number"


@functools.cache
def spikingjelly_datasets() -> Any:
    """SpikingJelly's data set package, imported on demand: it takes seconds (SciPy, matplotlib)."""
    with warnings.catch_warnings():
        # Its docstrings hold invalid escapes, which the compiler warns of on the first import.
        warnings.simplefilter("ignore")
        return importlib.import_module("spikingjelly.datasets")


def integrate(events: dict[str, NDArray[Any]], time_steps: int, side: int, path: Path) -> NDArray[Any]:
    """Events -> frames [T, 2, side, side]: counts in the smallest unsigned type that holds them; `path` for messages.

    The first T - 1 frames hold N // T events each, the last one the rest.

    Raises:
        UserError: fewer events than time steps, or events outside the sensor.
    """
    count = len(events["t"])
    if count < time_steps:
        raise UserError(f"time_steps: {time_steps} is more than the {count} events in {path}; use fewer")
    if max(int(events["x"].max()), int(events["y"].max())) >= side or min(events["x"].min(), events["y"].min()) < 0:
        raise UserError(f"{path} holds events outside of {side} x {side} pixels; it is damaged or of another sensor")
    sj = spikingjelly_datasets()
    frames = sj.integrate_events_by_fixed_frames_number(events, "number", time_steps, side, side)
    return np.asarray(frames.astype(np.min_scalar_type(int(frames.max()))))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file name to write to, which is renamed to `path` when everything is written.

    Raises:
        UserError: it cannot be written; `path` is untouched.
    """
    try:
        with replacing(path) as partial:
            yield partial
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(f"{path} cannot be written: {reason}; free some space, or give another --data-dir") from error


def write_events(path: Path, events: dict[str, NDArray[Any]]) -> None:
    """Store the events of one sample."""
    write_npz(path, {key: np.asarray(events[key]).astype(kind) for key, kind in _TYPES.items()})


def read_events(path: Path, side: int) -> dict[str, NDArray[Any]]:
    """The events of one sample, each array int64 [n]; `side` is that of the sensor in pixels.

    Raises:
        UserError: the file is damaged, or holds something else: arrays that differ in length, coordinates that are not
            whole or outside of the sensor, a polarity other than 0 and 1.
    """
    found = read_npz(path, dict.fromkeys(_TYPES, REAL))
    if len({values.shape for values in found.values()}) > 1 or found["t"].ndim != 1:
        shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in found.items())
        raise UserError(f"{path} holds events of shapes {shapes}; expected one length for all; {_AGAIN}")
    for name, values in found.items():
        least, most = _RANGES.get(name, (0, side - 1))
        odd = ~np.isfinite(values) | (values < least) | (values > most)
        if values.dtype.kind == "f":
            odd |= values != np.trunc(values)
        if odd.any():
            where = f"outside of {side} x {side} pixels" if name in "xy" else f"outside of {least} to {most}"
            raise UserError(
                f"{path} holds events {where}, or no whole numbers: {name} is {values[odd][0]}; it is damaged or of "
                f"another sensor: {_AGAIN}"
            )
    return {name: values.astype(np.int64) for name, values in found.items()}


def write_npz(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a compressed npz, whole or not at all."""
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_npz(path: Path, kinds: dict[str, str]) -> dict[str, NDArray[Any]]:
    """The arrays of an npz that `kinds` names, each of one of its kinds (`utils.npz`)."""
    try:
        return read_arrays(path, kinds)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(f"{path} is damaged ({reason}); {_AGAIN}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content) + "\n")


def read_record(schema: type[T], path: Path) -> T | None:
    """What `write_json` wrote, as `schema` describes it; None where there is no such file."""
    try:
        return read_json(schema, path, str(path), _AGAIN)
    except FileNotFoundError:
        return None


def is_whole(path: Path, key: str) -> bool:
    """Whether `path` is a complete npz that has `key`; reads only its end."""
    try:
        with open_regular(path) as opened, zipfile.ZipFile(opened) as file:
            return f"{key}.npy" in file.namelist()
    except Exception:  # damaged bytes raise many kinds of error
        return False


def list_samples(root: Path, folders: Iterable[str]) -> dict[str, list[str]]:
    """Folder -> the names of its npz files in SpikingJelly's order; a missing folder counts as empty."""
    found = {}
    for folder in folders:
        try:
            with os.scandir(root / folder) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(".npz") and entry.name[0] != "."]
        except (FileNotFoundError, NotADirectoryError):
            names = []
        found[folder] = sorted(names)
    return found


def make_frames(root: Path, samples: dict[str, list[str]], time_steps: int, side: int, *, check: bool = False) -> int:
    """Integrate the event files whose frames are missing; returns how many were.

    check: also remake frames whose file is damaged (an older tool may have been interrupted)
    """
    target = root / frames_folder(time_steps)
    present = list_samples(target, samples)
    jobs = []
    for folder, names in samples.items():
        here = set(present[folder])
        for name in names:
            path = target / folder / name
            if name not in here or (check and not is_whole(path, "frames")):
                jobs.append((root / EVENTS / folder / name, path, time_steps, side))
    for parent in {job[1].parent for job in jobs}:
        make_folder(parent)
    run_jobs(_make_one, jobs, f"frames, T = {time_steps}")
    return len(jobs)


def _make_one(events: Path, frames: Path, time_steps: int, side: int) -> None:
    write_npz(frames, {"frames": integrate(read_events(events, side), time_steps, side, events)})


def make_folder(folder: Path) -> None:
    """Create a folder and its parents."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; give another --data-dir") from error


def _cores() -> int:
    # Those that this process may use; in a container, the machine may have more.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(function: Callable[..., None], jobs: list[tuple[Any, ...]], title: str) -> None:
    """Call `function` with each of `jobs`, with a progress bar; by several processes if that takes long.

    It stops at the first error; files that were written before stay.
    """
    workers = min(_cores(), 32)
    started = time.perf_counter()
    with progress_bar(len(jobs), title, "file") as bar:
        for done, job in enumerate(jobs):
            spent = time.perf_counter() - started
            if workers > 1 and done and spent > _TRIAL and spent / done * (len(jobs) - done) > _WORTH_PROCESSES:
                _run_parallel(function, jobs[done:], workers, bar)
                return
            function(*job)
            bar.update()


def _run_parallel(function: Callable[..., None], jobs: list[tuple[Any, ...]], workers: int, bar: Any) -> None:
    # A new interpreter each: a fork would copy locks that torch's threads hold.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that converts files was killed, often for lack of memory; what was written stays, so start "
                "again when more memory is free"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def progress_bar(total: int | None, title: str, unit: str, **options: Any) -> Any:
    """A progress bar, updated less often where the output is no terminal; none where there is nothing to do."""
    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=title, unit=unit, mininterval=pause, disable=total == 0, **options)
