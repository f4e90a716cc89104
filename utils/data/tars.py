"""Data sets in tar files: a tar (or a folder of tars) per split with a folder per class, and WebDataset shards.

Both are map-style: each sample has a number, so that a sampler can give it exactly once and an epoch can be continued
in its middle. The package `webdataset` is not needed.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from pydantic import Field
from timm.utils import natural_key

from utils.data.images import decode
from utils.data.tar_index import Layout, tar_index
from utils.errors import UserError, one_line, shortened
from utils.schema import Count, Record, Text, read_json

_logger = logging.getLogger("sdt.data")  # a child of the run's log

INFO = "_info.json"  # lists the shards of each split, as those of timm's data sets on the Hugging Face hub do
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
_DIGITS = 12  # of a number in a pattern


class _Shards(Record):
    """The shards of one split."""

    filenames: list[Text] = Field(min_length=1)
    num_samples: Count


class _Info(Record):
    """The file INFO."""

    splits: dict[Text, _Shards]


class TarDataset:
    """The images of `files`, each with its class index."""

    def __init__(self, files: list[Path], layout: Layout, root: Path, mode: str) -> None:
        self.files, self.root, self.mode = files, root, mode
        self.index = tar_index(files, layout)
        self.class_to_idx = {str(name): i for i, name in enumerate(self.index.classes)}
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.index)

    def sample_name(self, index: int) -> str:
        """<tar, relative to data_dir>/<path or key in it>."""
        file = os.path.relpath(self.files[self.index.tar[index]], self.root)
        return f"{Path(file).as_posix()}/{self.index.name_of(index)}"

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        place = self.index
        size = int(place.size[index])
        # Opened for each sample, like the files of an image folder: nothing is shared between workers.
        try:
            with self.files[place.tar[index]].open("rb") as file:
                file.seek(int(place.offset[index]))
                content = file.read(size)
        except OSError as error:
            raise UserError(f"data_dir: {self.sample_name(index)} cannot be read ({error})") from error
        if len(content) != size:
            raise UserError(
                f"data_dir: {self.sample_name(index)}: the tar became shorter; start again with a whole one"
            )
        image = decode(io.BytesIO(content), self.mode, f"{self.root}/{self.sample_name(index)}")
        return self.transform(image) if self.transform else image, int(place.label[index])


def open_shards(root: Path, names: list[str], *, key: str, classes: int, mode: str) -> TarDataset:
    """The WebDataset shards of a split.

    names:  of the split: its own, then synonyms. Looked up in _info.json, then as a folder, then as a word in
            the names of the tars. The first one may be a pattern instead, as train-{0000..0127}.tar, train-*.tar
    key:    the setting that holds it, for messages

    Raises:
        UserError: no shards, a missing one, or one that does not hold what it should.
    """
    if not root.is_dir():
        raise UserError(f"data_dir: {root} is no folder; expected WebDataset shards (.tar) in it")
    files, expected = _shards(root, names, key)
    split = names[0]
    dataset = TarDataset(files, "shards", root, mode)
    if expected is not None and len(dataset) != expected:
        raise UserError(
            f"data_dir: {root / INFO} names {expected} samples of {split!r}, its {len(files)} shards hold "
            f"{len(dataset)}; copy the shards again"
        )
    labels = dataset.index.label
    outside = ((labels < 0) | (labels >= classes)).nonzero()[0]
    if len(outside):
        i = int(outside[0])
        raise UserError(
            f"data_dir: {root}/{dataset.sample_name(i)}: class index {labels[i]} does not fit num_classes "
            f"{classes} (valid: 0 to {classes - 1}); set num_classes to at least {labels.max() + 1}, or mend the label"
        )
    if labels.max() + 1 < classes:
        _logger.warning(
            "num_classes is %d, the labels of %s %r go up to %d only", classes, key, split, int(labels.max())
        )
    return dataset


def _shards(root: Path, names: list[str], key: str) -> tuple[list[Path], int | None]:
    """The files of a split, and how many samples they should hold where that is known."""
    split = names[0]
    if re.search(r"[{*?\[]|\.tar$", split):
        return _matching(root, [split], key), None
    listed = _listed(root)
    for name in names:
        if name in listed:
            return _matching(root, listed[name][0], f"{INFO}, split {name}"), listed[name][1]
    for name in names:
        files = list((root / name).glob("*.tar"))
        files = files or [file for file in root.glob("*.tar") if name in re.split(r"[-_.]", file.stem)]
        if files:
            return sorted(files, key=lambda file: natural_key(file.name)), None
    raise UserError(
        f"{key}: no shards of {split!r} in {root}; expected {root}/{split}/*.tar or {root}/*-{split}-*.tar, "
        f"or give a pattern as {key}: name-{{0000..0127}}.tar"
    )


def _matching(root: Path, patterns: list[str], place: str) -> list[Path]:
    files: list[Path] = []
    seen: set[Path] = set()
    # One after the other, so that a pattern of endless names ends at the first file that is missing.
    for name in (name for pattern in patterns for name in _expanded(pattern, place)):
        found = sorted(glob(str(root / name)), key=natural_key) if re.search(r"[*?\[]", name) else []
        for file in [Path(path) for path in found] or [root / name]:
            if not file.is_file():
                raise UserError(f"{place}: {file} does not exist; copy it there, or correct the name")
            if file in seen:
                raise UserError(f"{place}: {file} is listed twice; its samples would count twice")
            seen.add(file)
            files.append(file)
    return files


def _expanded(pattern: str, place: str) -> Iterator[str]:
    """a-{08..10}.tar as a-08.tar, a-09.tar, a-10.tar."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if max(len(first), len(last)) > _DIGITS or int(first) > int(last):
        raise UserError(
            f"{place}: {shortened(pattern)} does not count up from {one_line(first)} to {one_line(last)}; write the "
            f"smaller number first, of at most {_DIGITS} digits"
        )
    for n in range(int(first), int(last) + 1):
        name = str(n).zfill(len(first))
        yield from _expanded(pattern[: match.start()] + name + pattern[match.end() :], place)


def _listed(root: Path) -> dict[str, tuple[list[str], int]]:
    """Split name: (names of the shards, number of samples), from _info.json."""
    remedy = "expected splits: <name>: filenames, num_samples; correct or remove it"
    try:
        info = read_json(_Info, root / INFO, f"data_dir: {root / INFO}", remedy)
    except FileNotFoundError:
        return {}
    return {name: (split.filenames, split.num_samples) for name, split in info.splits.items()}
