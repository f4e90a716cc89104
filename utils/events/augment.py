"""Augmentations of event data, drawn for each sample and the same for all of its T frames.

Sources: flip, roll, rotation, shear and cutout of frames: NDA (Li et al., ECCV 2022); cutout: DeVries and Taylor,
arXiv 1708.04552; one operation at random strength: TrivialAugment (Mueller and Hutter, ICCV 2021); events removed
before integration: EventDrop (Gu et al., IJCAI 2021).

Frames are [T, C, H, W]; torchvision's functions take all T at once. Resampling is to the nearest pixel, so that
counts stay counts. Random numbers come from torch's global generator, which the loader seeds per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import functional as F

from utils.config.settings import Config

Operation = Callable[[Tensor], Tensor]
PUBLISHED_HOLE = 16  # pixels, of dvs_aug
_BINS = 31  # strengths of TrivialAugment
_MAX_SHEAR, _MAX_SHIFT, _MAX_ANGLE = 0.3, 5.0, 30.0  # of the published set: ratio, pixels, degrees


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _integer(low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


def flip(frames: Tensor, probability: float) -> Tensor:
    """Mirror left and right, all frames or none (NDA)."""
    return F.hflip(frames) if _uniform(0, 1) < probability else frames


def roll(frames: Tensor, most: int) -> Tensor:
    """Shift by up to `most` pixels along each axis; what leaves on one side comes in on the other (NDA)."""
    return torch.roll(frames, (_integer(-most, most), _integer(-most, most)), dims=(-2, -1))


def rotate(frames: Tensor, most: float) -> Tensor:
    """Turn by up to `most` degrees around the centre (NDA)."""
    return _affine(frames, angle=_uniform(-most, most))


def shear(frames: Tensor, most: float) -> Tensor:
    """Shear along x by up to `most`, in pixels per pixel (NDA)."""
    return _affine(frames, shear=_uniform(-most, most))


def cutout(frames: Tensor, side: int) -> Tensor:
    """Set one square of `side` pixels to 0; its centre may be any pixel, so a part may lie outside (Cutout).

    The published runs drew one square for the whole batch.
    """
    height, width = frames.shape[-2:]
    y, x = _integer(0, height - 1), _integer(0, width - 1)
    rows = slice(max(0, y - side // 2), y - side // 2 + side)
    columns = slice(max(0, x - side // 2), x - side // 2 + side)
    result = frames.clone()
    result[..., rows, columns] = 0
    return result


def trivial(frames: Tensor) -> Tensor:
    """One of identity, shear, shift along x, shift along y and rotation, at one of 31 strengths (TrivialAugment)."""
    operation = _integer(0, 4)
    if operation == 0:
        return frames
    strength = _integer(0, _BINS - 1) / (_BINS - 1) * 2.0 - 1.0  # -1 to 1
    if operation == 1:
        return _affine(frames, shear=strength * _MAX_SHEAR)
    if operation == 4:
        return _affine(frames, angle=strength * _MAX_ANGLE)
    pixels = math.trunc(strength * _MAX_SHIFT)
    return _affine(frames, shift=(pixels, 0) if operation == 2 else (0, pixels))


def _affine(frames: Tensor, *, angle: float = 0.0, shear: float = 0.0, shift: tuple[int, int] = (0, 0)) -> Tensor:
    # torchvision shears by an angle; the published augmentation takes the ratio as an angle in radians.
    degrees = [math.degrees(shear), 0.0]
    return F.affine(frames, angle=angle, translate=list(shift), scale=1.0, shear=degrees)


def frame_operations(cfg: Config) -> list[Operation]:
    """The augmentations of frames that the settings ask for, in the order in which they are applied."""
    hole = cfg.event_cutout or (PUBLISHED_HOLE if cfg.dvs_aug else 0)
    chosen: list[tuple[bool, Operation]] = [
        (cfg.event_hflip > 0, partial(flip, probability=cfg.event_hflip)),
        (cfg.event_roll > 0, partial(roll, most=cfg.event_roll)),
        (cfg.event_rotate > 0, partial(rotate, most=cfg.event_rotate)),
        (cfg.event_shear > 0, partial(shear, most=cfg.event_shear)),
        (hole > 0, partial(cutout, side=hole)),
        (cfg.dvs_trival_aug, trivial),
    ]
    return [] if cfg.no_aug else [operation for wanted, operation in chosen if wanted]


Events = dict[str, NDArray[Any]]


def drop_events(events: Events, side: int, least: int) -> Events:
    """EventDrop: drop nothing, a period of time, an area or a random share of the events, each with probability 1/4.

    least: events that must stay, one per frame; if fewer would, nothing is dropped
    """
    kept = (_all, drop_time, drop_area, drop_random)[_integer(0, 3)](events, side)
    return {key: values[kept] for key, values in events.items()} if int(kept.sum()) >= least else events


def _all(events: Events, side: int) -> NDArray[np.bool_]:
    return np.ones(len(events["t"]), bool)


def drop_time(events: Events, side: int) -> NDArray[np.bool_]:
    """Which events stay when a period of 10% to 90% of the recording is dropped (EventDrop)."""
    t = events["t"]
    share = _integer(1, 9) / 10
    start = t[0] + _uniform(0, 1) * (t[-1] - t[0])
    return np.asarray((t < start) | (t > start + share * (t[-1] - t[0])))


def drop_area(events: Events, side: int) -> NDArray[np.bool_]:
    """Which events stay when a square with a side of 5% to 25% of the sensor's is dropped (EventDrop)."""
    length = _integer(1, 5) / 20 * side
    left, top = _uniform(0, side) - length / 2, _uniform(0, side) - length / 2
    x, y = events["x"], events["y"]
    return np.asarray((x < left) | (x >= left + length) | (y < top) | (y >= top + length))


def drop_random(events: Events, side: int) -> NDArray[np.bool_]:
    """Which events stay when 10% to 90% of them are dropped at random (EventDrop)."""
    count = len(events["t"])
    kept = np.ones(count, bool)
    kept[torch.randperm(count)[: int(count * _integer(1, 9) / 10)].numpy()] = False
    return kept
