"""The embedded event set: the embedded digits, recorded by a simulated event camera that makes three movements.

It is made at its first use, in seconds, and not kept in git: 1,797 small binary files would make each clone larger, and
they depend only on data/digits/digits.npz and the constants below. To record digits with a moving camera is the idea of
N-MNIST (Orchard et al., Frontiers in Neuroscience 9:437, 2015).

Legend: B images, H x W pixels, t microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils import ROOT
from utils.events.files import EVENTS, list_samples, make_folder, progress_bar, write_events
from utils.events.sensor import Events, EventSensor, Floats

DIGITS_FILE = ROOT / "data" / "digits" / "digits.npz"  # found from any current directory
SIDE = 32  # pixels of the sensor
_INK = 24  # pixels that the 8 x 8 image is enlarged to
_DARK, _BRIGHT = 0.1, 1.0  # intensity of paper and of full ink: a bright digit on a dark screen, as in N-MNIST
_DURATION, _STEP = 300_000, 2_000  # microseconds: three movements of 100 ms, an image each 2 ms
# Corners of the path in pixels, (x, y): down and right, up and right, and back.
_CORNERS = np.array([[-3.0, -3.0], [0.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])
_SEED = 2023
_BATCH = 64  # images simulated at once: limits the memory, without effect on the events

SENSOR = EventSensor(SIDE, SIDE, seed=_SEED)


def gaze(t: float) -> tuple[float, float]:
    """Shift of the image in pixels (x, y) at time t, on a closed triangle at constant speed along each side."""
    place = min(max(t / _DURATION, 0.0), 1.0) * (len(_CORNERS) - 1)
    leg = min(int(place), len(_CORNERS) - 2)
    x, y = _CORNERS[leg] + (place - leg) * (_CORNERS[leg + 1] - _CORNERS[leg])
    return float(x), float(y)


def scene(images: NDArray[np.uint8]) -> Callable[[float], Floats]:
    """Digits uint8 [B, 8, 8], 0 paper to 255 ink -> intensities [B, H, W] as a function of t."""
    reach = int(np.ceil(np.abs(_CORNERS).max())) + 1  # pixels outside of the sensor that move into it
    canvas = np.zeros((len(images), SIDE + 2 * reach, SIDE + 2 * reach))
    corner = reach + (SIDE - _INK) // 2
    for i, image in enumerate(images):
        enlarged = Image.fromarray(image).resize((_INK, _INK), Image.Resampling.BILINEAR)
        canvas[i, corner : corner + _INK, corner : corner + _INK] = np.asarray(enlarged) / 255.0
    canvas = _DARK + (_BRIGHT - _DARK) * canvas

    def seen(t: float) -> Floats:
        x, y = gaze(t)
        left, top = reach - x, reach - y
        column, row = int(np.floor(left)), int(np.floor(top))
        across, down = left - column, top - row
        view = canvas[:, row : row + SIDE + 1, column : column + SIDE + 1]
        rows = (1.0 - down) * view[:, :-1] + down * view[:, 1:]
        mixed: Floats = (1.0 - across) * rows[:, :, :-1] + across * rows[:, :, 1:]
        return mixed

    return seen


def simulate(images: NDArray[np.uint8], numbers: NDArray[np.int64]) -> list[Events]:
    """The events of digits uint8 [B, 8, 8]; `numbers` [B] are their places in the whole set, for the noise."""
    seeds = [(_SEED, int(number)) for number in numbers]
    return SENSOR.record(scene(images), _DURATION, _STEP, seeds)


def file_name(number: int) -> str:
    """The event file of a digit, by its place in digits.npz."""
    return f"digit_{number:04d}.npz"


def expected_files(digits: Path = DIGITS_FILE) -> dict[str, int]:
    """Event file ('train/3/digit_0017.npz') -> place of its digit in `digits`."""
    with np.load(digits, allow_pickle=False) as content:
        labels, is_test = content["labels"].tolist(), content["is_test"].tolist()
    return {
        f"{'test' if test else 'train'}/{label}/{file_name(number)}": number
        for number, (label, test) in enumerate(zip(labels, is_test, strict=True))
    }


def complete(root: Path) -> None:
    """Write the event files that `root` lacks."""
    expected = expected_files()
    folders = {path.rpartition("/")[0] for path in expected}
    present = {f"{folder}/{name}" for folder, names in list_samples(root / EVENTS, folders).items() for name in names}
    missing = [(number, root / EVENTS / path) for path, number in expected.items() if path not in present]
    if not missing:
        return
    for folder in folders:
        make_folder(root / EVENTS / folder)
    with np.load(DIGITS_FILE, allow_pickle=False) as content:
        images = (content["images"].astype(np.uint16) * 255 // 16).astype(np.uint8)
    with progress_bar(len(missing), "simulating digits-dvs, once", "sample") as bar:
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            numbers = np.array([number for number, _ in batch])
            for (_, path), events in zip(batch, simulate(images[numbers], numbers), strict=True):
                write_events(path, events)
                bar.update()
