"""Where the values of each tensor come from, followed through every operator that a network runs.

A network is spike-driven if between its input and its output it only adds, compares, chooses and masks. `Origins` sees
each operator, keeps for each tensor what its values are made of, and names every operator that is none of these.

Legend: b matrices, each M x K times K x N.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from utils.errors import listed


class Made(enum.IntEnum):
    """What the values of a tensor are made of; of several, the largest wins."""

    CONSTANT = 0  # numbers of the code and buffers
    LEARNED = 1  # parameters
    WHOLE = 2  # spikes, masks, and sums of them
    REAL = 3  # membrane values: sums of weights
    INPUT = 4  # the data itself


@dataclass(frozen=True)
class Factor:
    """A constant that values were multiplied by, and where."""

    value: float
    operator: str
    place: str

    def __str__(self) -> str:
        return f"{self.operator} (x {self.value:.4g}) in {self.place}"


@dataclass(frozen=True)
class Origin:
    """What is known of a tensor.

    factors: constants that its values still carry; a threshold or the head may take them in.
    mixed: parts of it carry other factors than others, so that no threshold can take them in.
    product: number of the product with weights whose output this is, and how many BatchNorms were folded into it.
    """

    made: Made
    factors: tuple[Factor, ...] = ()
    mixed: bool = False
    product: tuple[int, int] | None = None

    @property
    def is_data(self) -> bool:
        return self.made > Made.LEARNED

    @property
    def scale(self) -> float:
        return math.prod(factor.value for factor in self.factors)


CONSTANT = Origin(Made.CONSTANT)


def joined(origins: Iterable[Origin]) -> Origin:
    """The origin of values that are added to each other, or of which some are chosen."""
    found = list(origins)
    data = [one for one in found if one.is_data]
    if not data:
        return Origin(max((one.made for one in found), default=Made.CONSTANT))
    made = max(one.made for one in data)
    if made is Made.INPUT and any(one.made is not Made.INPUT for one in data):
        made = Made.REAL
    if made is Made.WHOLE and any(one.made is Made.LEARNED for one in found):
        made = Made.REAL
    factors = tuple(dict.fromkeys(factor for one in data for factor in one.factors))
    mixed = any(one.mixed for one in data) or len({round(one.scale, 12) for one in data}) > 1
    return Origin(made, factors, mixed)


class Storages:
    """Storage -> what is known of the tensors that lie there. Views share their storage, and so what is known."""

    def __init__(self) -> None:
        # The reference keeps the address of a freed storage from being used for another one.
        self._known: dict[int, tuple[Origin, StorageWeakRef]] = {}

    def get(self, tensor: Tensor) -> Origin | None:
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known[0] if known else None

    def set(self, tensor: Tensor, origin: Origin) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = origin, StorageWeakRef(storage)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)


def is_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool((tensor == tensor.round()).all())


def is_binary(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def factored(origin: Origin, value: float, operator: str, place: str) -> Origin:
    """`origin` multiplied by a constant. The sign of a value is no product."""
    if abs(value) in (0.0, 1.0) or not origin.is_data:
        return replace(origin, product=None)
    return replace(origin, factors=(*origin.factors, Factor(value, operator, place)), product=None)


def in_words(factors: tuple[Factor, ...]) -> str:
    return listed([str(factor) for factor in dict.fromkeys(factors)])
