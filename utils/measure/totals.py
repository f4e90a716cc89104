"""Counts of calls summed over time steps, samples, batches and processes.

Legend: T time steps, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from utils.measure.spike_values import ADDITIONS, NONZERO, OPERATIONS, ROWS, Values
from utils.measure.synapse_counts import Call
from utils.run.distributed import Process

OF_SAMPLES = [NONZERO, OPERATIONS, ADDITIONS]  # what is kept of each sample


def by_step_and_sample(calls: Sequence[Call], T: int, B: int, stepwise: bool) -> Tensor:
    """The counts of one batch of B samples, `[ROWS, steps, samples]`.

    Steps is T. It is 1 for a layer that runs before time begins, and where the shapes do not tell the time step.
    Samples is B, or 1 where the shapes do not tell the sample. Time is taken for the outermost dimension, and the
    sample for the next one: [T, B, ...], [T*B, ...] or [T*B*N].
    """
    counts = [call.counts for call in calls if call.counts is not None]
    ordered = all(call.in_order for call in calls)
    if stepwise and len(counts) % T == 0:  # a call is one step, or a part of one for a layer that is used several times
        samples = B if ordered and all(part.shape[1] % B == 0 for part in counts) else 1
        rows = torch.stack([part.reshape(ROWS, samples, -1).sum(dim=2) for part in counts], dim=1)
        return rows.reshape(ROWS, T, -1, samples).sum(dim=2)
    timed = ordered and all(part.shape[1:3] == (T, B) or part.shape[1] % (T * B) == 0 for part in counts)
    known = timed or (ordered and all(part.shape[1] % B == 0 for part in counts))
    shape = (ROWS, T if timed else 1, B if known else 1, -1)
    return torch.stack([part.reshape(shape).sum(dim=3) for part in counts]).sum(dim=0)


@dataclass
class Total:
    """One module over all batches: counts by time step, sizes over all steps; both over all samples."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(ROWS, 0, dtype=torch.int64))  # [ROWS, steps]
    sizes: tuple[int, ...] = (0, 0, 0)  # macs, inputs, outputs
    low: float = math.inf
    high: float = 0.0
    # Of each batch, the counts `OF_SAMPLES` by sample [3, B]; None once the shapes did not tell the sample.
    samples: list[Tensor] | None = field(default_factory=list)

    @property
    def steps(self) -> int:
        """0: never called. 1: before time begins, or where the shapes did not tell the time step. Else T."""
        return self.counts.shape[1]

    @property
    def values(self) -> Values:
        return Values.of(self.counts.sum(dim=1).tolist(), self.low, self.high)

    def add(self, calls: Sequence[Call], T: int, B: int, stepwise: bool = False) -> None:
        """Add one batch of B samples."""
        sizes = zip(self.sizes, *((call.macs, call.inputs, call.outputs) for call in calls), strict=True)
        self.sizes = tuple(map(sum, sizes))
        self.low = min(self.low, *(call.low for call in calls))
        self.high = max(self.high, *(call.high for call in calls))
        if all(call.counts is None for call in calls):
            return
        counts = by_step_and_sample(calls, T, B, stepwise)  # [ROWS, steps, samples]
        self._add(counts.sum(dim=2))
        told = self.samples is not None and counts.shape[2] == B
        self.samples = [*(self.samples or []), counts[OF_SAMPLES].sum(dim=1).cpu()] if told else None

    def _add(self, counts: Tensor) -> None:
        steps = counts.shape[1] if self.steps in (0, counts.shape[1]) else 1
        self.counts = _in_steps(counts, steps) + (_in_steps(self.counts, steps) if self.steps else 0)

    def on_cpu(self) -> Total:
        return replace(self, counts=self.counts.cpu())

    def per_sample(self, size: int, runs: int) -> int:
        """A size for one sample and run; a mean where it differs between samples."""
        return round(self.sizes[size] / runs)


def sum_totals(totals: Mapping[str, Total], process: Process) -> dict[str, Total]:
    """Summed over all processes (each must call this), in the order in which the first of them ran the modules."""
    summed: dict[str, Total] = {}
    parts = process.gather_objects({name: one.on_cpu() for name, one in totals.items()})
    for part in parts:
        for name, one in part.items():
            total = summed.setdefault(name, Total())
            total.sizes = tuple(map(sum, zip(total.sizes, one.sizes, strict=True)))
            total.low, total.high = min(total.low, one.low), max(total.high, one.high)
            total._add(one.counts)
    for name, total in summed.items():
        samples = [part[name].samples if name in part else [] for part in parts]
        total.samples = _joined(samples)
    return summed


def _joined(samples: list[list[Tensor] | None]) -> list[Tensor] | None:
    """The samples of all processes as one batch."""
    known = [torch.cat(batches, dim=1) for batches in samples if batches]
    return None if None in samples or not known else [interleaved(known)]


def interleaved(parts: list[Tensor]) -> Tensor:
    """`[..., samples]` of each process, in the order of the data set: process r of W has samples r, r + W, ..."""
    places = torch.cat([torch.arange(part.shape[-1]) * len(parts) + rank for rank, part in enumerate(parts)])
    return torch.cat(parts, dim=-1)[..., places.argsort()]


def _in_steps(counts: Tensor, steps: int) -> Tensor:
    return counts if counts.shape[1] == steps else counts.sum(dim=1, keepdim=True)
