"""The data sets: what is known of each, and how its files are opened.

Samples are (image, class index). The image is a PIL image until the transform, then a tensor [C, H, W]. Event data
(utils.events.dataset) brings frames [T, C, H, W] instead.

A new set of images is one more row of `DATASETS`, or a plugin (utils.data.register).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from timm.data import AugMixDataset, create_dataset, create_reader
from torch.utils.data import Subset

from utils.config.settings import Config
from utils.data.facts import DatasetFacts, DataSettings, ImageSet, check_classes, resolve
from utils.data.folders import EVAL_NAMES, TRAIN_NAMES, no_folder, open_folder, open_split_shards, split_names
from utils.data.images import DigitsDataset, HubDataset, pil_mode
from utils.data.sample_list import listed_samples
from utils.data.transforms import eval_transform, train_transform
from utils.errors import UserError, did_you_mean, first_line
from utils.events.dataset import build_events
from utils.events.digits import DIGITS_FILE
from utils.events.sources import SOURCES, EventSource

_logger = logging.getLogger("sdt.data")  # a child of the run's log


def build_datasets(cfg: Config) -> tuple[ImageSet, ImageSet]:
    """Open the training and the evaluation split, with their transforms."""
    train, evaluation = build_dataset(cfg, training=True), build_dataset(cfg, training=False)
    train_classes, eval_classes = (_class_names(dataset) for dataset in (train, evaluation))
    if train_classes != eval_classes:
        odd = sorted(train_classes ^ eval_classes)
        raise UserError(
            f"data_dir: {cfg.data_dir!r}: splits {cfg.train_split!r} and {cfg.val_split!r} have different "
            f"class folders ({len(odd)} in one of them only, as {odd[0]!r}); give both the same folders"
        )
    return train, evaluation


def build_dataset(cfg: Config, *, training: bool) -> ImageSet:
    """Open one split. With `aug_splits`, a training sample's image is a tuple of that many tensors."""
    facts, settings = dataset_facts(cfg.dataset), resolve_data(cfg)
    dataset = facts.open(cfg, training)
    if facts.events:
        return dataset
    classes = len(_class_names(dataset))
    if classes:
        check_classes(cfg, classes)
    if not training:
        dataset.transform = eval_transform(settings)
        return dataset
    listed = listed_samples(dataset, Path(cfg.train_split_path)) if cfg.train_split_path else None
    if cfg.hflip > 0 and not facts.mirrors and not cfg.no_aug:
        _logger.warning("hflip: %g mirrors %s, where not each class survives it; set hflip: 0", cfg.hflip, cfg.dataset)
    if cfg.aug_splits:
        dataset = AugMixDataset(dataset, num_splits=cfg.aug_splits)
    dataset.transform = train_transform(cfg, settings)
    untyped: Any = dataset
    return untyped if listed is None else Subset(untyped, listed)  # type: ignore[return-value]  # needs no transform


def _innermost(dataset: Any) -> Any:
    """The set inside AugMixDataset and Subset."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def _class_names(dataset: Any) -> set[str]:
    """Class names where the data set knows them, else an empty set."""
    source = _innermost(dataset)
    source = getattr(source, "reader", source)
    return set(getattr(source, "class_to_idx", ()))


def names_of_classes(cfg: Config) -> list[str] | None:
    """The name of each class, in the order of the labels; None where the data set is not at hand or does not know."""
    if cfg.dataset in SOURCES:
        return SOURCES[cfg.dataset].classes
    if cfg.dataset == "digits":
        return [str(digit) for digit in range(10)]
    try:
        source = _innermost(build_dataset(cfg, training=False))
    except UserError:
        return None
    if hasattr(source, "classes"):  # torchvision's
        return [str(name) for name in source.classes]
    labels: dict[str, int] = getattr(getattr(source, "reader", source), "class_to_idx", {})
    return sorted(labels, key=labels.__getitem__) or None


def _fixed_split(cfg: Config, training: bool) -> bool:
    """Whether the asked split of a set with two fixed splits is its training split."""
    key, (name, *_) = split_names(cfg, training)
    if name in TRAIN_NAMES:
        return True
    if name in (*EVAL_NAMES, "test"):
        return False
    raise UserError(
        f"{key}: {name!r} is no split of dataset {cfg.dataset!r}; valid: "
        f"{', '.join((*TRAIN_NAMES, *EVAL_NAMES, 'test'))}"
    )


def _open_digits(cfg: Config, training: bool) -> DigitsDataset:
    file = Path(cfg.data_dir) / DIGITS_FILE.name if cfg.data_dir else DIGITS_FILE
    if not file.is_file():
        raise UserError(f"data_dir: {file} does not exist; leave data_dir out to use the embedded set")
    train = _fixed_split(cfg, training)
    try:
        return DigitsDataset(file, train=train)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data_dir: {file} cannot be read ({first_line(error)}); leave data_dir out to use the embedded set"
        ) from error


def _open_cifar(cfg: Config, training: bool) -> ImageSet:
    split = "train" if _fixed_split(cfg, training) else "validation"
    expected = {"torch/cifar10": "cifar-10-batches-py", "torch/cifar100": "cifar-100-python"}[cfg.dataset]
    return _open_torchvision(cfg, split, cfg.data_dir or "data", expected)


def _open_torch(cfg: Config, training: bool) -> ImageSet:
    if not cfg.data_dir:
        raise no_folder(cfg)
    return _open_torchvision(cfg, split_names(cfg, training)[1][0], cfg.data_dir)


def _open_torchvision(cfg: Config, split: str, root: str, expected: str = "") -> ImageSet:
    """A set of torchvision, by timm's factory; `expected` lies in `root`, for a message."""
    try:
        dataset: ImageSet = create_dataset(
            cfg.dataset, root=root, split=split, download=cfg.dataset_download, input_img_mode=pil_mode(cfg.in_channels)
        )
    except _UNREADABLE as error:
        remedy = "check the network" if cfg.dataset_download else "add --dataset-download, or give --data-dir"
        if isinstance(error, ImportError):
            remedy = "install that package"
        what = f"{root}/{expected}" if expected else f"split {split!r} in {root}"
        raise _missing(cfg, what, error, remedy) from error
    return dataset


def _open_hub(cfg: Config, training: bool) -> HubDataset:
    split, root = split_names(cfg, training)[1][0], cfg.data_dir or None
    try:
        reader = create_reader(cfg.dataset, root=root, split=split)
    except _UNREADABLE as error:
        remedy = "check its name, its splits and the network"
        if isinstance(error, ImportError):
            remedy = "install that package (pip install datasets)"
        raise _missing(cfg, f"split {split!r} in {root or 'the cache'}", error, remedy) from error
    return HubDataset(reader, cfg.dataset, pil_mode(cfg.in_channels), cfg.num_classes)


# What timm, torchvision and the hub's package raise for files that are missing or damaged.
_UNREADABLE = (RuntimeError, OSError, ValueError, AssertionError, ImportError)


def _missing(cfg: Config, what: str, error: BaseException, remedy: str) -> UserError:
    return UserError(f"dataset {cfg.dataset!r}: {what} is missing or damaged ({first_line(error)}); {remedy}")


def _events(source: EventSource) -> DatasetFacts:
    # Counts of two polarities, not normalised. A mirrored gesture is another one.
    size, classes = source.image_size, len(source.classes)
    return DatasetFacts(
        _open_events, classes, 2, size, (0.0, 0.0), (1.0, 1.0), crop_pct=1.0, mirrors=False, events=True
    )


def _open_events(cfg: Config, training: bool) -> ImageSet:
    return build_events(cfg, resolve_data(cfg).input_size, training=training)


FOLDER = DatasetFacts(open_folder, is_imagenet=True)
# mean and std of the 1,437 training images (8 x 8, before any resize); a test computes them again.
DIGITS = DatasetFacts(_open_digits, 10, 1, 32, (0.3050,), (0.3765,), crop_pct=1.0, mirrors=False)
CIFAR10 = DatasetFacts(_open_cifar, 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
CIFAR100 = DatasetFacts(_open_cifar, 100, 3, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
DATASETS: dict[str, DatasetFacts] = {
    "digits": DIGITS,
    "torch/cifar10": CIFAR10,
    "torch/cifar100": CIFAR100,
    "imagenet": FOLDER,
    "folder": FOLDER,
    "": FOLDER,
    **{name: _events(source) for name, source in SOURCES.items()},
}
# Sets that timm opens by index. Its streaming readers are left out on purpose: without an index nothing promises that
# each evaluation sample counts once, and an epoch cannot be continued in its middle. WebDataset shards are read by our
# own index (utils.data.tars).
_TORCH_SETS = ("mnist", "fashion_mnist", "kmnist", "qmnist", "imagenet", "places365", "inaturalist")
_BY_PREFIX = {"hfds": DatasetFacts(_open_hub), "wds": DatasetFacts(open_split_shards, is_imagenet=True)}
_STREAMING = ("hfids", "tfds")


def dataset_facts(name: str) -> DatasetFacts:
    """Look `name` up.

    Raises:
        UserError: it is unknown; the message lists the valid names.
    """
    if name in DATASETS:
        return DATASETS[name]
    prefix, _, rest = name.partition("/")
    if prefix == "torch" and rest in _TORCH_SETS:
        return DatasetFacts(_open_torch)
    if prefix in _BY_PREFIX and (rest or prefix == "wds"):
        return _BY_PREFIX[prefix]
    if prefix in _STREAMING:
        raise UserError(
            f"dataset: {name!r} is a stream, which cannot be counted or continued exactly; "
            f"use hfds/<name>, WebDataset shards (wds/<name>) or a folder of images (dataset: folder)"
        )
    valid = [*filter(None, DATASETS), *(f"torch/{known}" for known in _TORCH_SETS), "hfds/<name>", "wds/<name>"]
    raise UserError(
        f"dataset: {name!r} is unknown; valid: {', '.join(valid)}, or one that a --plugin registers"
        f"{did_you_mean(name, valid)}"
    )


def resolve_data(cfg: Config) -> DataSettings:
    """The input's settings, completed from what is known of the data set; needs no files.

    Raises:
        UserError: settings and data set do not fit together.
    """
    return resolve(cfg, dataset_facts(cfg.dataset))
