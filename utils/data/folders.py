"""Image folders, tars of them and WebDataset shards: which files are the split, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import create_reader
from timm.utils import natural_key

from utils.config.settings import Config
from utils.data.images import decode, pil_mode
from utils.data.tars import TarDataset, open_shards
from utils.errors import UserError
from utils.files import open_regular

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "valid", "eval", "evaluation")


class FolderDataset:
    """A folder of images per class, as timm's reader lists and numbers them.

    Not timm's own data set: that one puts the next file in place of a damaged one.
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
            with open_regular(path) as file:
                image = decode(file, self.mode, path)
        except OSError as error:
            raise UserError(f"data_dir: {path} cannot be read ({error.strerror}); replace or remove it") from error
        return self.transform(image) if self.transform else image, label


def open_folder(cfg: Config, training: bool) -> FolderDataset | TarDataset:
    """The images of <data_dir>/<split>/<class>/, or of tars with a folder per class.

    Raises:
        UserError: no such folder, no images in it, or a class folder without any.
    """
    if not cfg.data_dir:
        raise no_folder(cfg)
    tars = _split_tars(cfg, training)
    if tars:
        return TarDataset(tars, "classes", Path(cfg.data_dir), pil_mode(cfg.in_channels))
    root = _split_folder(cfg, training)
    try:
        dataset = FolderDataset(root, pil_mode(cfg.in_channels))
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


def open_split_shards(cfg: Config, training: bool) -> TarDataset:
    """The WebDataset shards of a split; see `utils.data.tars.open_shards`."""
    if not cfg.data_dir:
        raise no_folder(cfg)
    key, tried = split_names(cfg, training)
    return open_shards(Path(cfg.data_dir), tried, key=key, classes=cfg.num_classes, mode=pil_mode(cfg.in_channels))


def no_folder(cfg: Config) -> UserError:
    """The error of a set that is nowhere unless `data_dir` says where."""
    return UserError(f"data_dir: dataset {cfg.dataset!r} has no default folder; give --data-dir")


def split_names(cfg: Config, training: bool) -> tuple[str, list[str]]:
    """The setting that names the split, and the names to look for: its value, then the synonyms."""
    key, name = ("train_split", cfg.train_split) if training else ("val_split", cfg.val_split)
    synonyms: tuple[str, ...] = next((names for names in (TRAIN_NAMES, EVAL_NAMES) if name in names), ())
    return key, [name, *(synonym for synonym in synonyms if synonym != name)]


def _split_tars(cfg: Config, training: bool) -> list[Path]:
    """<split>.tar, or all tars of a split's folder that holds no class folders; else nothing."""
    for name in split_names(cfg, training)[1]:
        folder = Path(cfg.data_dir) / name
        if folder.is_dir():
            if any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
                return []
            return sorted(folder.glob("*.tar"), key=lambda file: natural_key(file.name))
        if folder.with_name(f"{name}.tar").is_file():
            return [folder.with_name(f"{name}.tar")]
    return []


def _split_folder(cfg: Config, training: bool) -> Path:
    key, tried = split_names(cfg, training)
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
