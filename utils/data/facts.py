"""What is known of each data set, and the input settings that follow from it.

`resolve_data` needs no files.
Legend: C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from utils.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from utils.config.settings import Config

LARGE_VALID_SIDE, LARGE_VALID_RESIZE = 288, 320  # pixels
Build = Callable[["Config", bool], Any]  # see utils.data.register


@dataclass(frozen=True)
class DatasetFacts:
    """What does not depend on the settings. None: it depends on the files or on the settings."""

    kind: Literal["digits", "torch", "hub", "folder", "shards", "events", "own"]
    classes: int | None = None
    channels: int | None = None
    image_size: int | tuple[int, int] = 224  # pixels, side or height and width, if img_size is not given
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # per channel, of values in 0..1
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875  # evaluation: share of the resized image that the centre crop keeps
    mirrors: bool = True  # a mirrored image keeps its class
    default_root: str = ""  # if data_dir is not given; relative to the current directory
    expected: str = ""  # what lies in that root
    build: Build | None = None  # opens a split of a registered data set

    @property
    def events(self) -> bool:
        return self.kind == "events"


@dataclass(frozen=True)
class DataSettings:
    """What the model and the transforms need to know of the input, complete and checked."""

    input_size: tuple[int, int, int]  # C, H, W in training
    eval_size: tuple[int, int, int]  # differs with large_valid
    mean: tuple[float, ...]  # C values
    std: tuple[float, ...]
    interpolation: str  # of the evaluation's resize
    crop_pct: float
    normalise_on_device: bool  # the workers hand over uint8 [C, H, W], else normalised float32


FOLDER = DatasetFacts("folder")
# mean and std of the 1,437 training images (8 x 8, before any resize); a test computes them again.
DIGITS = DatasetFacts("digits", 10, 1, 32, (0.3050,), (0.3765,), crop_pct=1.0, mirrors=False)
CIFAR10 = DatasetFacts(
    "torch",
    10,
    3,
    32,
    (0.4914, 0.4822, 0.4465),
    (0.247, 0.2435, 0.2616),
    default_root="data",
    expected="cifar-10-batches-py",
)
CIFAR100 = DatasetFacts(
    "torch",
    100,
    3,
    32,
    (0.5071, 0.4867, 0.4408),
    (0.2675, 0.2565, 0.2761),
    default_root="data",
    expected="cifar-100-python",
)


def _events(classes: int, side: int, root: str) -> DatasetFacts:
    # Counts of two polarities, not normalised. A mirrored gesture is another one.
    return DatasetFacts("events", classes, 2, side, (0.0, 0.0), (1.0, 1.0), 1.0, False, root)


DATASETS: dict[str, DatasetFacts] = {
    "digits": DIGITS,
    "torch/cifar10": CIFAR10,
    "torch/cifar100": CIFAR100,
    "imagenet": FOLDER,
    "folder": FOLDER,
    "": FOLDER,
    "digits-dvs": _events(10, 32, ""),
    "cifar10-dvs": _events(10, 64, "data/cifar10-dvs"),
    "cifar10-dvs-tet": _events(10, 64, "data/cifar10-dvs"),
    "gesture": _events(11, 128, "data/DVSGesturedataset"),
}
# Other sets that timm opens by index. Its streaming readers are left out on purpose: without an index nothing
# promises that each evaluation sample counts once, and an epoch cannot be continued in its middle. WebDataset
# shards are read by our own index (utils.data.tars).
_TORCH_SETS = ("mnist", "fashion_mnist", "kmnist", "qmnist", "imagenet", "places365", "inaturalist")
_STREAMING = ("hfids", "tfds")
AVAILABLE = [name for name in DATASETS if name] + [f"torch/{name}" for name in _TORCH_SETS]
AVAILABLE += ["hfds/<name>", "wds/<name>"]


def dataset_facts(name: str) -> DatasetFacts:
    """Look `name` up; UserError with the valid names if it is unknown."""
    if name in DATASETS:
        return DATASETS[name]
    prefix, _, rest = name.partition("/")
    if prefix == "torch" and rest in _TORCH_SETS:
        return DatasetFacts("torch")
    if prefix == "hfds" and rest:
        return DatasetFacts("hub")
    if prefix == "wds":
        return DatasetFacts("shards")
    if prefix in _STREAMING:
        raise UserError(
            f"dataset: {name!r} is a stream, which cannot be counted or continued exactly; "
            f"use hfds/<name>, WebDataset shards (wds/<name>) or a folder of images (dataset: folder)"
        )
    known = ", ".join(AVAILABLE)
    raise UserError(
        f"dataset: {name!r} is unknown; valid: {known}, or one that a --plugin registers{did_you_mean(name, AVAILABLE)}"
    )


def resolve_data(cfg: Config) -> DataSettings:
    """Complete the input's settings from the data set's facts; UserError where the two disagree."""
    facts = dataset_facts(cfg.dataset)
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
    if large and facts.kind not in ("folder", "shards"):
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
