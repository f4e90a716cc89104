"""Data sets of a user's own: a plugin registers them, and they are opened by name like the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.config.settings import Config
from utils.data.datasets import DATASETS, resolve_data
from utils.data.facts import DatasetFacts
from utils.data.images import to_mode
from utils.errors import UserError
from utils.events.augment import frame_operations
from utils.events.dataset import FrameTransform


def register_dataset(
    name: str,
    build: Callable[[Config, bool], Any],
    *,
    classes: int,
    input_size: tuple[int, int, int],
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    events: bool = False,
) -> None:
    """Let the setting `dataset: NAME` stand for a data set of one's own.

    Args:
        build: called as `build(cfg, training)`; opens the training or the evaluation split. What it returns has a
            length, and `[index]` is (sample, class number) for each index below that length. A sample is a PIL image
            or a uint8 array [H, W] or [H, W, 3], and gets the transforms of the settings; with `events`, it is a
            tensor or an array of event counts [T, 2, H, W], T being `cfg.time_steps`.
        classes: number of classes.
        input_size: C, H, W of the model's input, where the settings name no other size.
        mean, std: of values in 0..1, per channel or one for all. Event counts are not normalised.
        events: whether the samples are event frames.

    Raises:
        ValueError: the name is taken, or the number of channels fits neither images nor events.
    """
    channels, height, width = input_size
    if name in DATASETS:
        raise ValueError(f"there is a data set {name!r} already; choose another name")
    if channels not in ((2,) if events else (1, 3)):
        valid = "1 or 3 for images, 2 for event frames"
        raise ValueError(f"dataset {name!r}: input_size {input_size} has channels {channels}; valid: {valid}")
    if events:
        mean, std = (0.0,), (1.0,)

    def open_split(cfg: Config, training: bool) -> OwnDataset:
        samples = build(cfg, training)
        return _with_frames(samples, cfg, training) if events else OwnDataset(samples, cfg, _as_image)

    DATASETS[name] = DatasetFacts(
        open_split,
        classes,
        channels,
        (height, width),
        tuple(mean) * (channels if len(mean) == 1 else 1),
        tuple(std) * (channels if len(std) == 1 else 1),
        crop_pct=1.0,
        events=events,
    )


class OwnDataset:
    """The samples of a registered data set, checked, with a transform."""

    def __init__(self, samples: Any, cfg: Config, check: Callable[[Any], Any]) -> None:
        self.dataset, self.name, self.classes, self._check = samples, cfg.dataset, cfg.num_classes, check
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        sample, label = self.dataset[index]
        try:
            if not 0 <= int(label) < self.classes:
                raise ValueError(f"label {int(label)}; valid: 0 to {self.classes - 1}")
            sample = self._check(sample)
        except ValueError as error:
            raise UserError(f"dataset {self.name!r}: sample {index}: {error}") from error
        try:
            return self.transform(sample) if self.transform else sample, int(label)
        except OverflowError as error:
            raise UserError(
                f"event_wire: uint8 cannot carry sample {index} of {self.name!r}, {error}; set event_wire: float32"
            ) from error


def _with_frames(samples: Any, cfg: Config, training: bool) -> OwnDataset:
    """Event frames with their transform."""
    for name in ("event_split", "event_drop") if training else ():
        if getattr(cfg, name):
            raise UserError(f"{name}: does not apply to {cfg.dataset!r}, whose frames a plugin makes; leave it out")
    _, height, width = resolve_data(cfg).input_size
    frames = OwnDataset(samples, cfg, _Frames(cfg.time_steps))
    frames.transform = FrameTransform(height, width, frame_operations(cfg) if training else [], cfg.event_wire)
    return frames


def _as_image(sample: Any) -> Image.Image:
    if isinstance(sample, Image.Image):
        return to_mode(sample, "L") if sample.mode.startswith(("I", "F")) else sample
    array = np.asarray(sample)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"{array.dtype} {list(array.shape)}; give a PIL image, or uint8 [H, W] or [H, W, 3]")
    return Image.fromarray(array)


class _Frames:
    """A class, not a function in `_with_frames`: loader processes get it by pickling."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, sample: Any) -> torch.Tensor:
        frames = torch.as_tensor(sample)
        if frames.dim() != 4 or tuple(frames.shape[:2]) != (self.steps, 2):
            raise ValueError(f"shape {list(frames.shape)}; give event counts [T, 2, H, W], T = {self.steps}")
        return frames
