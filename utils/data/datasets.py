"""Opens the data sets: where the files of each are, and what is wrong if they are not.

Samples are (image, class index). The image is a PIL image until the transform, then a tensor [C, H, W]. Event data
(utils.events.dataset) brings frames [T, C, H, W] instead.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from timm.data import AugMixDataset, create_dataset, create_reader
from timm.utils import natural_key

from utils.data.facts import DatasetFacts, check_classes, dataset_facts, resolve_data
from utils.data.images import decode
from utils.data.register import OwnDataset, as_image, own_events
from utils.data.sample_list import listed_samples
from utils.data.tars import TarDataset, open_shards
from utils.data.transforms import eval_transform, train_transform
from utils.errors import UserError, first_line
from utils.events.dataset import DIGITS_FILE, build_events

if TYPE_CHECKING:
    from utils.config.settings import Config

_logger = logging.getLogger("sdt.data")  # a child of the run's log

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "valid", "eval", "evaluation")


class ImageSet(Protocol):
    """A map-style data set: `dataset[i]` is (transformed image, class index)."""

    transform: Any

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


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
    settings = resolve_data(cfg)
    facts = dataset_facts(cfg.dataset)
    if facts.events:
        build_frames = build_events if facts.build is None else functools.partial(own_events, facts.build)
        return build_frames(cfg, settings.input_size, training=training)
    if facts.build is not None:
        dataset: ImageSet = OwnDataset(facts.build(cfg, training), cfg, as_image)
    elif facts.kind == "digits":
        dataset = _open_digits(cfg, training)
    elif facts.kind == "folder":
        dataset = _open_folder(cfg, training)
    elif facts.kind == "shards":
        dataset = _open_shards(cfg, training)
    else:
        dataset = _open_by_timm(cfg, facts, training)
    classes = len(_class_names(dataset))
    if classes:
        check_classes(cfg, classes)
    if not training:
        dataset.transform = eval_transform(settings)
        return dataset
    if cfg.train_split_path:
        dataset = listed_samples(dataset, Path(cfg.train_split_path))
    if cfg.hflip > 0 and not facts.mirrors and not cfg.no_aug:
        _logger.warning("hflip: %g mirrors %s, where not each class survives it; set hflip: 0", cfg.hflip, cfg.dataset)
    if cfg.aug_splits:
        dataset = AugMixDataset(dataset, num_splits=cfg.aug_splits)
    dataset.transform = train_transform(cfg, settings)
    return dataset


def _class_names(dataset: Any) -> set[str]:
    """Class names where the data set knows them, else an empty set."""
    source = dataset
    while hasattr(source, "dataset"):  # inside AugMixDataset, ListedSamples
        source = source.dataset
    source = getattr(source, "reader", source)
    return set(getattr(source, "class_to_idx", ()))


def _fixed_split(cfg: Config, training: bool) -> bool:
    """Whether the asked split of a set with two fixed splits is its training split."""
    key, name = ("train_split", cfg.train_split) if training else ("val_split", cfg.val_split)
    if name in TRAIN_NAMES:
        return True
    if name in (*EVAL_NAMES, "test"):
        return False
    raise UserError(
        f"{key}: {name!r} is no split of dataset {cfg.dataset!r}; valid: "
        f"{', '.join((*TRAIN_NAMES, *EVAL_NAMES, 'test'))}"
    )


class DigitsDataset:
    """The embedded handwritten digits as grey ('L') 8 x 8 PIL images; see data/README.md."""

    def __init__(self, file: Path, *, train: bool) -> None:
        # Opened here: of a damaged file, numpy would leave the closing to chance.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            chosen = content["is_test"] != train
            # 17 grey levels to 0..255: paper is 0, full ink is 255.
            self.images: np.ndarray = (content["images"][chosen].astype(np.uint16) * 255 // 16).astype(np.uint8)
            self.labels: np.ndarray = content["labels"][chosen].astype(np.int64)
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, int(self.labels[index])


def _open_digits(cfg: Config, training: bool) -> DigitsDataset:
    file = Path(cfg.data_dir) / DIGITS_FILE.name if cfg.data_dir else DIGITS_FILE
    if not file.is_file():
        raise UserError(f"data_dir: {file} does not exist; leave data_dir out to use the embedded set")
    train = _fixed_split(cfg, training)
    try:
        return DigitsDataset(file, train=train)
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(
            f"data_dir: {file} cannot be read ({first_line(error)}); leave data_dir out to use the embedded set"
        ) from error


def _open_by_timm(cfg: Config, facts: DatasetFacts, training: bool) -> ImageSet:
    split = cfg.train_split if training else cfg.val_split
    if facts.classes:  # CIFAR
        split = "train" if _fixed_split(cfg, training) else "validation"
    root = cfg.data_dir or facts.default_root or None
    if root is None and facts.kind == "torch":
        raise UserError(f"data_dir: dataset {cfg.dataset!r} has no default folder; give --data-dir")
    try:
        if facts.kind == "hub":
            return HubDataset(create_reader(cfg.dataset, root=root, split=split), cfg)
        return create_dataset(
            cfg.dataset, root=root, split=split, download=cfg.dataset_download, input_img_mode=_mode(cfg)
        )
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError) as error:
        remedy = "check the network" if cfg.dataset_download else "add --dataset-download, or give --data-dir"
        if facts.kind == "hub":
            remedy = "check its name, its splits and the network"
        if isinstance(error, ImportError):
            remedy = "install that package (pip install datasets)" if facts.kind == "hub" else "install that package"
        expected = f"{root}/{facts.expected}" if facts.expected else f"split {split!r} in {root or 'the cache'}"
        raise UserError(
            f"dataset {cfg.dataset!r}: {expected} is missing or damaged ({first_line(error)}); {remedy}"
        ) from error


def _mode(cfg: Config) -> str:
    return "L" if cfg.in_channels == 1 else "RGB"


class FolderDataset:
    """A folder of images per class, as timm's reader lists and numbers them.

    timm's own data set puts the next file in place of a damaged one; here that is an error: each sample
    counts once.
    """

    def __init__(self, root: Path, mode: str) -> None:
        reader = create_reader("", root=str(root))
        self.samples: list[tuple[str, int]] = reader.samples
        self.class_to_idx: dict[str, int] = reader.class_to_idx
        self.root, self.mode = root, mode  # mode of PIL: 'L' or 'RGB'
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.samples)

    def sample_name(self, index: int) -> str:
        """<class>/<image>: the path below the split's folder."""
        return Path(self.samples[index][0]).relative_to(self.root).as_posix()

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        path, label = self.samples[index]
        try:
            with open(path, "rb") as file:
                image = decode(file, self.mode, path)
        except OSError as error:
            raise UserError(f"data_dir: {path} cannot be read ({error.strerror}); replace or remove it") from error
        return self.transform(image) if self.transform else image, label


class HubDataset:
    """A data set of the Hugging Face hub, as timm's reader opens it; a damaged image is an error here too."""

    def __init__(self, reader: Any, cfg: Config) -> None:
        self.reader, self.name, self.mode, self.classes = reader, cfg.dataset, _mode(cfg), cfg.num_classes
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        file, label = self.reader[index]
        with file:
            image = decode(file, self.mode, f"{self.name}, sample {index},")
        if not isinstance(label, int) or not 0 <= label < self.classes:
            raise UserError(
                f"dataset {self.name!r}: sample {index} has label {label!r}, which does not fit num_classes "
                f"{self.classes} (valid: 0 to {self.classes - 1}); choose a labelled split or set num_classes"
            )
        return self.transform(image) if self.transform else image, label


def _open_folder(cfg: Config, training: bool) -> FolderDataset | TarDataset:
    if not cfg.data_dir:
        raise UserError(f"data_dir: dataset {cfg.dataset!r} has no default folder; give --data-dir")
    tars = _split_tars(cfg, training)
    if tars:
        return TarDataset(tars, "classes", Path(cfg.data_dir), _mode(cfg))
    root = _split_folder(cfg, training)
    try:
        dataset = FolderDataset(root, _mode(cfg))
    except RuntimeError as error:
        raise UserError(f"data_dir: {root} holds no images; expected {root}/<class>/<image>") from error
    # timm numbers the folders that hold images: an empty one would shift the labels of all that follow.
    known = dataset.class_to_idx
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in known:
            names = {inner.name for inner in folder.rglob("*") if inner.is_dir()}
            if not names & known.keys():
                raise UserError(f"data_dir: class folder {folder} holds no images; fill or remove it")
    return dataset


def _open_shards(cfg: Config, training: bool) -> TarDataset:
    if not cfg.data_dir:
        raise UserError(f"data_dir: dataset {cfg.dataset!r} has no default folder; give --data-dir")
    key, tried = _split_names(cfg, training)
    return open_shards(Path(cfg.data_dir), tried, key=key, classes=cfg.num_classes, mode=_mode(cfg))


def _split_names(cfg: Config, training: bool) -> tuple[str, list[str]]:
    """The setting that names the split, and the names to look for: its value, then the synonyms."""
    key, name = ("train_split", cfg.train_split) if training else ("val_split", cfg.val_split)
    synonyms: tuple[str, ...] = next((names for names in (TRAIN_NAMES, EVAL_NAMES) if name in names), ())
    return key, [name, *(synonym for synonym in synonyms if synonym != name)]


def _split_tars(cfg: Config, training: bool) -> list[Path]:
    """<split>.tar, or all tars of a split's folder that holds no class folders; else nothing."""
    for name in _split_names(cfg, training)[1]:
        folder = Path(cfg.data_dir) / name
        if folder.is_dir():
            if any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
                return []
            return sorted(folder.glob("*.tar"), key=lambda file: natural_key(file.name))
        if folder.with_name(f"{name}.tar").is_file():
            return [folder.with_name(f"{name}.tar")]
    return []


def _split_folder(cfg: Config, training: bool) -> Path:
    key, tried = _split_names(cfg, training)
    root, name = Path(cfg.data_dir), tried[0]
    if not root.is_dir():
        raise UserError(f"data_dir: {root} is no folder; expected {root}/{name}/<class>/<image>")
    for candidate in tried:
        if (root / candidate).is_dir():
            return root / candidate
    raise UserError(
        f"{key}: {name!r}: no folder of that name in {root} (tried {', '.join(tried)}); "
        f"expected {root}/{name}/<class>/<image>"
    )
