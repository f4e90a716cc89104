"""The setting `train_split_path`: a text file that lists the training samples to use.

One sample per line: its number in the order of the data set (from 0), or its name where samples have one: the path
below the folder of the split (<class>/<image>), in tars <tar>/<path>, in WebDataset shards <shard>/<key>.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.errors import UserError, did_you_mean, shortened
from utils.files import read_text

_DIGITS = 18
_KEY = "train_split_path"


def listed_samples(dataset: Any, file: Path) -> list[int]:
    """The numbers of the samples of `dataset` that `file` lists, in its order.

    Raises:
        UserError: no such file, an empty one, a line that names no sample, or one that comes twice.
    """
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"{_KEY}: {file} cannot be read ({reason}); give a text file of one sample per line") from error
    entries = [(number, text) for number, line in enumerate(lines, 1) if (text := line.strip())]
    if not entries:
        raise UserError(f"{_KEY}: {file} is empty; give one sample per line, or leave {_KEY} out")
    named = not all(text.isdecimal() for _, text in entries)
    numbers = _by_name(dataset, file) if named else {}
    line_of: dict[int, int] = {}
    for line, text in entries:
        # Python turns no text of thousands of digits into a number.
        index = numbers.get(text.removeprefix("./")) if named else int(text) if len(text) <= _DIGITS else None
        if index is None or index >= len(dataset):
            raise UserError(
                f"{_KEY}: {file}, line {line}: {shortened(text)} is no sample of this split{_valid(dataset, text)}"
            )
        if index in line_of:
            raise UserError(
                f"{_KEY}: {file}, line {line}: {shortened(text)} is already in line {line_of[index]}; remove one"
            )
        line_of[index] = line
    return list(line_of)


def _by_name(dataset: Any, file: Path) -> dict[str, int]:
    if not hasattr(dataset, "sample_name"):
        raise UserError(
            f"{_KEY}: {file}: the samples of this data set have no names; give numbers from 0 to {len(dataset) - 1}"
        )
    return {dataset.sample_name(i): i for i in range(len(dataset))}


def _valid(dataset: Any, text: str) -> str:
    numbers = f"; valid: 0 to {len(dataset) - 1}"
    if not hasattr(dataset, "sample_name"):
        return numbers
    hint = (
        "" if text.isdecimal() else did_you_mean(text, (dataset.sample_name(i) for i in range(min(1000, len(dataset)))))
    )
    return f"{numbers}, or names as {dataset.sample_name(0)!r}{hint}"
