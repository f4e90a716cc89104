"""Where each sample is inside tar files, so that samples can be read in any order, as from a folder.

The headers are read once. The index is kept beside the tars (or in the cache folder), and made again when a name, size
or modification time differs. Offsets are in bytes from the start of the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils import natural_key

from utils.data.tar_members import Member, members
from utils.errors import UserError
from utils.files import cache_folder, replacing
from utils.npz import BYTES, TEXT, read_arrays

_logger = logging.getLogger("sdt.data")  # a child of the run's log

Layout = Literal["classes", "shards"]  # a folder per class inside the tars, or WebDataset's <key>.<extension>
SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL_FIELDS = ("label", "cls")  # of a sample's .json

_FORMAT = 2  # of the index file; with another number it is made again
_KINDS = dict(key=TEXT, tar="i", offset="i", size="i", label="i", name=BYTES, classes=TEXT)
_CLASS_INDEX = re.compile(r"[-+]?[0-9]{1,9}")
_LARGEST_LABEL = 2**24  # bytes of a label's file


class Sample(NamedTuple):
    """One image. Its label is a class index in shards, the class's name elsewhere."""

    name: str
    offset: int
    size: int
    label: Any


@dataclass(frozen=True)
class TarIndex:
    """N samples in order of file and place; arrays, because worker processes share their memory."""

    tar: np.ndarray  # int32 [N], position in the list of tars
    offset: np.ndarray  # int64 [N]
    size: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N]
    name: np.ndarray  # UTF-8 bytes [N]: path inside the tar, in shards the key
    classes: np.ndarray  # text: the name of each class index; empty for shards

    def __len__(self) -> int:
        return len(self.tar)

    def fits(self, sizes: list[int]) -> bool:
        """Whether each sample lies within its tar; `sizes` are those of the tars in bytes."""
        columns = (self.tar, self.offset, self.size, self.label, self.name)
        if not len(self) or any(column.shape != self.tar.shape or column.ndim != 1 for column in columns):
            return False
        if self.tar.min() < 0 or self.tar.max() >= len(sizes) or min(self.offset.min(), self.size.min()) < 0:
            return False
        if self.classes.ndim != 1 or (
            len(self.classes) and not 0 <= self.label.min() <= self.label.max() < len(self.classes)
        ):
            return False
        return bool((self.size <= np.array(sizes)[self.tar] - self.offset).all())

    def name_of(self, i: int) -> str:
        return self.name[i].decode(errors="surrogateescape")


def tar_index(files: list[Path], layout: Layout) -> TarIndex:
    """The index of `files`, read from its file where that is up to date, else made.

    Raises:
        UserError: a tar that is cut short or damaged, a sample without image, label or class folder.
    """
    key = _key(files, layout)
    places = _places(files, layout)
    for place in places:
        found = _load(place, key, files)
        if found is not None:
            return found
    _logger.info("indexing %d tar file(s) in %s, once", len(files), files[0].parent)
    index = _build(files, layout)
    for place in places:
        try:
            _store(index, place, key)
        except OSError as error:
            _logger.info("no index kept in %s (%s)", place.parent, error)
        else:
            break
    return index


def _build(files: list[Path], layout: Layout) -> TarIndex:
    read: Callable[[Path, bool], Iterator[Sample]] = _by_class if layout == "classes" else _by_key
    found = [(number, sample) for number, file in enumerate(files) for sample in read(file, len(files) > 1)]
    if not found:
        kinds = ", ".join(SHARD_IMAGES if layout == "shards" else sorted(get_img_extensions()))
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise UserError(f"data_dir: {files[0]}{more} holds no images ({kinds})")
    labels = [sample.label for _, sample in found]
    classes: list[str] = []
    if layout == "classes":
        classes = sorted(set(labels), key=natural_key)  # numbered as in an image folder
        numbers = {name: i for i, name in enumerate(classes)}
        labels = [numbers[label] for label in labels]
    return TarIndex(
        tar=np.array([number for number, _ in found], np.int32),
        offset=np.array([sample.offset for _, sample in found], np.int64),
        size=np.array([sample.size for _, sample in found], np.int64),
        label=np.array(labels, np.int64),
        name=np.array([sample.name.encode(errors="surrogateescape") for _, sample in found]),
        classes=np.array(classes, np.str_),
    )


# --- what a tar holds --------------------------------------------------------------------------------------


def _by_class(file: Path, several: bool) -> Iterator[Sample]:
    """Images labelled by the innermost folder; among several tars, a tar without folders is a class itself."""
    extensions = get_img_extensions(as_set=True)
    for member in members(file, nested=True):
        if PurePosixPath(member.name).suffix.lower() not in extensions:
            continue
        folders = PurePosixPath(file.stem if several else "", member.folder, PurePosixPath(member.name).parent)
        if not folders.name:
            raise UserError(
                f"data_dir: {file}: image {member.name!r} lies in no class folder; expected <class>/<image>"
            )
        yield Sample(str(PurePosixPath(member.folder, member.name)), member.offset, member.size, folders.name)


def _by_key(file: Path, several: bool) -> Iterator[Sample]:
    """Successive members with the same key are a sample: <key>.jpg or another image, <key>.cls or <key>.json."""
    key, parts = "", dict[str, Member]()
    with file.open("rb") as raw:
        for member in members(file, nested=False):
            path = PurePosixPath(member.name)
            stem, _, extension = path.name.partition(".")
            name = str(path.with_name(stem))
            if name != key:
                yield from _sample(file, key, parts, raw)
                key, parts = name, {}
            if extension.lower() in parts:
                raise UserError(f"data_dir: {file}: sample {key!r} has two .{extension.lower()}; keys must differ")
            parts[extension.lower()] = member
        yield from _sample(file, key, parts, raw)


def _sample(file: Path, key: str, parts: dict[str, Member], raw: IO[bytes]) -> Iterator[Sample]:
    images = [parts[extension] for extension in SHARD_IMAGES if extension in parts]
    labelled = "cls" in parts or "json" in parts
    if not images and "cls" not in parts:
        return  # a note on the whole shard
    if len(images) != 1:
        raise UserError(
            f"data_dir: {file}: sample {key!r} has {len(images)} images; expected one of "
            f"{', '.join(f'{key}.{extension}' for extension in SHARD_IMAGES)} beside its label"
        )
    if not labelled:
        raise UserError(
            f"data_dir: {file}: sample {key!r} has no label; expected {key}.cls with the class index, "
            f"or {key}.json with a field {' or '.join(LABEL_FIELDS)}, next to the image in the tar"
        )
    part = parts.get("cls") or parts["json"]
    if part.size > _LARGEST_LABEL:
        raise UserError(f"data_dir: {file}: {part.name} has {part.size:,} bytes; expected a class index")
    raw.seek(part.offset)
    text = raw.read(part.size)
    yield Sample(key, images[0].offset, images[0].size, _label(text, f"{file}: {part.name}", "cls" in parts))


def _label(text: bytes, place: str, plain: bool) -> int:
    try:
        content: Any = text.decode().strip()
        if not plain:
            content = json.loads(content)
            content = next(content[name] for name in LABEL_FIELDS if name in content)
        if isinstance(content, (bool, float)) or not _CLASS_INDEX.fullmatch(str(content)):
            raise ValueError
        return int(content)
    except (ValueError, TypeError, StopIteration, RecursionError):
        shown = text[:40].decode(errors="replace").strip()
        wanted = "a class index" if plain else f"an object with a class index as {' or '.join(LABEL_FIELDS)}"
        raise UserError(f"data_dir: {place} holds {shown!r}; expected {wanted}") from None


# --- the index as a file -----------------------------------------------------------------------------------


def _key(files: list[Path], layout: Layout) -> str:
    """A digest of all that the index depends on."""
    facts = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([_FORMAT, layout, facts]).encode()).hexdigest()


def _places(files: list[Path], layout: Layout) -> list[Path]:
    """Beside the tars, and where that folder is read-only, in the user's cache folder."""
    beside = files[0].parent
    names = hashlib.sha256("\n".join([layout, *(str(file.name) for file in files)]).encode()).hexdigest()[:16]
    paths = hashlib.sha256("\n".join([layout, *(str(file.resolve()) for file in files)]).encode()).hexdigest()[:16]
    return [beside / f".tar-index-{names}.npz", cache_folder() / f"tar-index-{paths}.npz"]


def _load(place: Path, key: str, files: list[Path]) -> TarIndex | None:
    try:
        content = read_arrays(place, _KINDS)
    except (OSError, ValueError):
        return None  # missing or damaged: the index is made again
    if str(content.pop("key")) != key:
        return None
    index = TarIndex(**content)
    return index if index.fits([file.stat().st_size for file in files]) else None


def _store(index: TarIndex, place: Path, key: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    arrays = {field.name: getattr(index, field.name) for field in fields(TarIndex)}
    with replacing(place) as temporary, temporary.open("wb") as file:
        np.savez(file, key=np.array(key), **arrays)
