"""What is known of a data set, and the settings of the input that follow from it.

Legend: C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from utils.config.settings import Config
from utils.errors import UserError

LARGE_VALID_SIDE, LARGE_VALID_RESIZE = 288, 320  # pixels


class ImageSet(Protocol):
    """A map-style data set: `dataset[i]` is (transformed image, class index)."""

    transform: Any

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set before its files are opened. None: it depends on the files or on the settings."""

    # Opens the training split (True) or the evaluation split (False): images without a transform, events with theirs.
    open: Callable[[Config, bool], ImageSet]
    classes: int | None = None
    channels: int | None = None
    image_size: int | tuple[int, int] = 224  # pixels, side or height and width, if img_size is not given
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # per channel, of values in 0..1
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875  # evaluation: share of the resized image that the centre crop keeps
    mirrors: bool = True  # a mirrored image keeps its class
    is_imagenet: bool = False  # may be evaluated at 288 pixels (large_valid)
    events: bool = False  # frames of events [T, 2, H, W] instead of images


@dataclass(frozen=True)
class DataSettings:
    """What the model and the transforms need to know of the input, complete and checked."""

    input_size: tuple[int, int, int]  # C, H, W in training
    eval_size: tuple[int, int, int]  # differs with large_valid
    mean: tuple[float, ...]  # C values
    std: tuple[float, ...]
    interpolation: str  # of the evaluation's resize
    crop_pct: float
    normalise_on_device: bool  # the workers give uint8 [C, H, W], else normalised float32


def resolve(cfg: Config, facts: DatasetFacts) -> DataSettings:
    """The settings of the input, completed from the facts of the data set; UserError where the two do not fit."""
    if facts.classes is not None:
        check_classes(cfg, facts.classes)
    if facts.channels is not None and cfg.in_channels != facts.channels:
        raise UserError(
            f"in_channels: {cfg.in_channels} does not fit dataset {cfg.dataset!r}, "
            f"which has {facts.channels}; set in_channels: {facts.channels}"
        )
    if not facts.events and cfg.in_channels not in (1, 3):
        raise UserError(f"in_channels: {cfg.in_channels} does not fit images; valid: 1 (grey), 3 (RGB)")
    input_size = _input_size(cfg, facts)
    large = cfg.large_valid
    if large and not facts.is_imagenet:
        raise UserError(
            f"large_valid: evaluates ImageNet at {LARGE_VALID_SIDE} pixels, it does not fit dataset "
            f"{cfg.dataset!r}; leave it out"
        )
    return DataSettings(
        input_size=input_size,
        eval_size=(input_size[0], LARGE_VALID_SIDE, LARGE_VALID_SIDE) if large else input_size,
        mean=_per_channel(cfg, "mean", facts.mean),
        std=_per_channel(cfg, "std", facts.std),
        interpolation="bilinear" if large else cfg.interpolation or "bicubic",
        crop_pct=LARGE_VALID_SIDE / LARGE_VALID_RESIZE if large else cfg.crop_pct or facts.crop_pct,
        # Random erasing fills normalised images, and it runs in the workers.
        normalise_on_device=not (facts.events or cfg.no_prefetcher or cfg.reprob > 0),
    )


def _input_size(cfg: Config, facts: DatasetFacts) -> tuple[int, int, int]:
    if cfg.input_size is None:
        size = cfg.img_size or facts.image_size
        return (cfg.in_channels, size, size) if isinstance(size, int) else (cfg.in_channels, *size)
    channels, height, width = cfg.input_size
    return channels, height, width


def _per_channel(cfg: Config, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    given = getattr(cfg, key)
    values = tuple(given) if given else default
    if given and len(values) == 1:
        values *= cfg.in_channels
    if len(values) != cfg.in_channels:
        found = str(list(values)) if given else f"no default for dataset {cfg.dataset!r}"
        wanted = "one value" if cfg.in_channels == 1 else f"{cfg.in_channels} values, or one for all"
        raise UserError(f"{key}: {found}, but in_channels is {cfg.in_channels}; give {wanted}")
    return values


def check_classes(cfg: Config, classes: int) -> None:
    """UserError unless the model is to have as many classes as the data."""
    if cfg.num_classes != classes:
        raise UserError(
            f"num_classes: {cfg.num_classes} does not fit dataset {cfg.dataset!r}, "
            f"which has {classes} classes; set num_classes: {classes}"
        )
