"""Which samples are trained on and which are evaluated: named splits, and a hash of each.

`first90` is the published split of CIFAR10-DVS: the first 90% of each class, in the order of the file names.
`random:<seed>` draws 90% of each class. Sets with folders train/ and test/ have their own split; that of the `.pt`
files may also be called `tet`.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

_TRAIN_SHARE = 0.9


class Sample(NamedTuple):
    """One sample: its path below the set's folder of events or frames, and its class index."""

    path: str
    label: int


class Split(NamedTuple):
    """The two parts of a data set."""

    train: list[Sample]
    test: list[Sample]

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 over both parts' paths and labels, in order."""
        lines = [f"{part} {s.path} {s.label}\n" for part in ("train", "test") for s in getattr(self, part)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def split_by_folder(samples: dict[str, list[str]], classes: list[str]) -> Split:
    """The split of a set whose `samples` are in folders `train/<class>` and `test/<class>`."""
    split = Split([], [])
    for part, chosen in (("train", split.train), ("test", split.test)):
        for label, name in enumerate(classes):
            chosen.extend(Sample(f"{part}/{name}/{file}", label) for file in samples[f"{part}/{name}"])
    return split


def split_by_name(samples: dict[str, list[str]], classes: list[str], name: str) -> Split:
    """The split `name` (`first90` or `random:<seed>`) of folders `<class>`."""
    split = Split([], [])
    generator = np.random.RandomState(random_seed(name)) if name != "first90" else None
    for label, folder in enumerate(classes):
        files = samples[folder]
        # As SpikingJelly does: rounded up, also where the product is above a whole number by a rounding error only.
        count = math.ceil(len(files) * _TRAIN_SHARE)
        order = range(len(files)) if generator is None else generator.permutation(len(files))
        everything = [Sample(f"{folder}/{files[i]}", label) for i in order]
        split.train.extend(sorted(everything[:count]))
        split.test.extend(sorted(everything[count:]))
    return split


def random_seed(name: str) -> int:
    """The seed in `random:<seed>`."""
    return int(name.partition(":")[2])


def check_hash(split: Split, expected: str | None, where: str) -> None:
    """UserError if the hash of the split is not `expected` (setting `split_hash`); None allows any."""
    if expected is not None and split.hash != expected:
        raise UserError(
            f"split_hash: {expected} is another split than that of {where}, {split.hash} "
            f"({len(split.train)} + {len(split.test)} samples): files or event_split differ; restore them, "
            "or leave split_hash out for a new run"
        )
