"""Of which kind the values are that enter a layer, and how many of them: spikes are added, real values multiplied.

Legend: R rows (of a time step, a sample or a token), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a table of counts, `[ROWS, ...]`, int64: values that are not 0, the weights that these meet, values that are
# 1; then with a value of n taken for n spikes the weights that they meet, and the spikes; values that are 1 or -1, and
# whole numbers.
NONZERO, OPERATIONS, ONES, ADDITIONS, MAGNITUDE, UNITS, WHOLE = range(7)
ROWS = 7
# Beyond this, a whole number is taken for a measured value and not for a number of spikes.
LARGEST_SPIKE = 255

# Values that are looked at in one go: few enough to stay in the processor's cache, or many for a GPU.
_CHUNK_CPU, _CHUNK = 1 << 17, 1 << 26
SUM_CONVENTION = "a value that is not 0 is one addition, whatever its size"


@dataclass(frozen=True)
class Values:
    """What kind of values a layer took, over all samples.

    kind: `binary` (0 and 1), `ternary` (-1, 0 and 1), `scaled` (0, and one other value with either sign), `integer`
        (whole numbers, as of integer-valued LIF), or `real`.
    low, high: smallest and largest size of a value that is not 0.
    """

    kind: str = "binary"
    low: float = 1.0
    high: float = 1.0

    @staticmethod
    def of(counts: Sequence[int], low: float, high: float) -> Values:
        """From counts `[ROWS]` over all samples."""
        nonzero = counts[NONZERO]
        if counts[ONES] == nonzero:
            return Values()
        kind = "real"
        if counts[UNITS] == nonzero:
            kind = "ternary"
        elif low == high:
            kind = "scaled"
        elif counts[WHOLE] == nonzero:
            kind = "integer"
        return Values(kind, low, high)

    @property
    def convention(self) -> str:
        """How an operation on such values is charged, in words."""
        return {
            "binary": "a spike is one addition",
            "ternary": "spikes of -1 and 1: one addition or subtraction each",
            "scaled": f"spikes of one size ({self.high:g}): one addition each, the size taken into the weights",
            "integer": f"whole numbers up to {self.high:g}: a spike of n is n additions",
            "real": "a value that is not 0 is one multiplication and addition",
        }[self.kind]


@dataclass(frozen=True)
class Counted:
    """Counts `[ROWS, R]` of some values, and the smallest and largest size of those that are not 0."""

    counts: Tensor
    low: float
    high: float


def count_values(rows: Tensor, taps: Tensor | None = None) -> Counted:
    """Count each of `rows` `[R, ...]`.

    Args:
        taps: how many products each place takes part in; `rows` is then `[R, C, *places]`. 1 by default.
    """
    size = max(1, rows[:1].numel())
    step = max(1, (_CHUNK_CPU if rows.device.type == "cpu" else _CHUNK) // size)
    weights = None if taps is None or bool(taps.eq(1).all()) else taps.to(rows.device, non_blocking=True)
    # float32 holds whole numbers up to 2**24
    kind = torch.float32 if size < 2**24 else torch.float64
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    inner = tuple(range(1, rows.dim()))
    parts = rows.split(step)
    for part in parts:
        marks = torch.empty_like(part, dtype=kind)
        # Comparing into floats and summing those takes a tenth of the time that summing booleans takes.
        if weights is None:
            nonzero = products = torch.ne(part, 0, out=marks).sum(dim=inner)
        else:
            places = torch.ne(part, 0, out=marks).sum(dim=1).flatten(1)  # [r, places]: over channels
            nonzero, products = places.sum(dim=1), places.double() @ weights
        found.append((nonzero, products, torch.eq(part, 1, out=marks).sum(dim=inner)))
    nonzero, products, ones = (torch.cat(counts).long() for counts in zip(*found, strict=True))
    fired, units = torch.stack([nonzero.sum(), ones.sum()]).tolist()
    if fired == units:  # as it is in every layer but the first of a spiking network
        counts = torch.stack([nonzero, products, ones, products, nonzero, nonzero, nonzero])
        return Counted(counts, *((1.0, 1.0) if fired else (torch.inf, 0.0)))
    graded = [_graded(part, weights) for part in parts]
    more = torch.cat([torch.stack(counts) for counts, _, _ in graded], dim=1).long()
    counts = torch.cat([torch.stack([nonzero, products, ones]), more])
    return Counted(counts, min(low for _, low, _ in graded), max(high for _, _, high in graded))


def _graded(part: Tensor, weights: Tensor | None) -> tuple[list[Tensor], float, float]:
    """Additions, magnitudes, units and whole numbers of values that are not all 0 and 1; and their smallest and
    largest size."""
    sizes = part.abs().double()
    inner = tuple(range(1, part.dim()))
    whole = (sizes == sizes.round()) & (sizes <= LARGEST_SPIKE)
    spikes = torch.where(whole, sizes, 0.0)
    magnitude = spikes.sum(dim=inner)
    additions = magnitude if weights is None else spikes.sum(dim=1).flatten(1) @ weights
    counts = [
        additions,
        magnitude,
        (sizes == 1).double().sum(dim=inner),
        (whole & (sizes != 0)).double().sum(dim=inner),
    ]
    return counts, float(torch.where(sizes == 0, torch.inf, sizes).min()), float(sizes.max())
