"""Firing rates, counted in integers from outside the model and divided once at the end.

The rate of a spike tensor at step t is the number of its elements that are not 0 over the number of all its elements,
over all samples of all batches and processes (paper, supplement S1).

Legend: T time steps, B batch.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import listed
from utils.measure.spike_values import NONZERO, ONES
from utils.measure.spread import Spread
from utils.measure.synapse_counts import Call, count_elements
from utils.measure.synapses import neurons_of
from utils.measure.totals import Total, sum_totals
from utils.run.distributed import Process
from utils.run.hooks import ForwardHook, Recorder, hooked


def spike_sources(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> the submodule whose output is that spike tensor: what the model's own `spike_sources()` says, or where
    it has none, every neuron layer under its module path."""
    named = getattr(model, "spike_sources", None)
    return dict(named()) if callable(named) else neurons_of(model)


@dataclass(frozen=True)
class FiringRow:
    """The spikes of one tensor at each time step, over all samples."""

    name: str
    paper_name: str
    elements_per_step: int
    spikes: list[int]  # values that are 1
    nonzero: list[int]  # values that are not 0: the same for spikes of 0 and 1
    # 95% interval of the mean rate over samples; None where they are fewer than two or cannot be told apart.
    mean_interval: tuple[float, float] | None = field(default=None, compare=False)

    @property
    def is_binary(self) -> bool:
        """Whether every value was 0 or 1."""
        return self.spikes == self.nonzero

    @property
    def rate(self) -> list[float]:
        """Share of elements that are not 0, per time step."""
        return [count / self.elements_per_step for count in self.nonzero]

    @property
    def mean_rate(self) -> float:
        return sum(self.nonzero) / (self.elements_per_step * len(self.nonzero))


class FiringRecorder(Recorder):
    """Counts the spikes in the outputs of some modules while it is entered.

    Nothing of a batch stays alive after it: a few integers per tensor and time step are kept.

    Args:
        sources: name -> module whose output `[T, B, ...]` is a spike tensor (`spike_sources(model)`). The calls of a
            neuron in SpikingJelly's single-step mode, with output `[B, ...]`, are the time steps of a batch.
        model: whose forward passes are the batches; needed for single-step modules only.

    Raises:
        ValueError: a batch with another number of time steps than those before.
    """

    def __init__(self, sources: Mapping[str, nn.Module], model: nn.Module | None = None) -> None:
        self._sources = dict(sources)
        self._model = model
        self._totals: dict[str, Total] = {}
        self._calls: dict[str, list[Call]] = {}  # of single-step modules in the batch that is running

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        with hooked(self._sources, self._hook), contextlib.ExitStack() as around:
            if self._model is not None:
                around.callback(self._model.register_forward_pre_hook(lambda *_: self._calls.clear()).remove)
                around.callback(self._model.register_forward_hook(lambda *_: self._join_calls(*self._calls)).remove)
            yield

    def _hook(self, name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() < 2:
                return
            single = self._model is not None and getattr(module, "step_mode", "m") == "s"
            call = count_elements(output.unsqueeze(0) if single else output)
            self._calls.setdefault(name, []).append(call)
            if not single:
                self._join_calls(name)

        return count

    def _join_calls(self, *names: str) -> None:
        for name in names:
            calls = self._calls.pop(name)
            one = _joined(calls)
            _, T, B = one.counts.shape  # type: ignore[union-attr]
            total = self._totals.setdefault(name, Total())
            if total.steps not in (0, T):
                raise ValueError(f"{name}: this batch has {T} time steps, those before {total.steps}")
            total.add([one], T, B)

    def rows(self, process: Process, name_of: Callable[[str], str] = lambda name: "") -> list[FiringRow]:
        """One row per tensor that was computed, in order of computation, summed over all processes (each must call
        this). `name_of` gives a paper's name of a tensor.

        Raises:
            ValueError: none of the tensors was computed.
        """
        totals = sum_totals(self._totals, process)
        rows = [_row(name, name_of(name), totals[name]) for name in self._sources if name in totals]
        if self._sources and not rows:
            raise ValueError(f"{listed(list(self._sources))}: no batch passed while spikes were counted")
        return rows


def _joined(calls: list[Call]) -> Call:
    """The calls of a single-step neuron, `[ROWS, 1, B]` each, as one of all time steps."""
    counts = [call.counts for call in calls if call.counts is not None]
    if len({part.shape[2] for part in counts}) > 1:
        counts = [part.sum(dim=2, keepdim=True) for part in counts]
    inputs, low, high = sum(call.inputs for call in calls), min(c.low for c in calls), max(c.high for c in calls)
    return Call(torch.cat(counts, dim=1), 0, inputs, 0, low, high)


def _row(name: str, paper_name: str, total: Total) -> FiringRow:
    nonzero, ones = total.counts[[NONZERO, ONES]].tolist()
    elements = total.sizes[1] // total.steps
    fired = total.samples[0][0] if total.samples else None  # [samples], all steps
    interval = None if fired is None else Spread.of(fired.double() / (total.sizes[1] / len(fired))).mean_interval
    return FiringRow(name, paper_name, elements, ones, nonzero, interval)


def as_dict(row: FiringRow) -> dict[str, Any]:
    """Counts and rates of one tensor, as report.json has them."""
    rates = {"rate": row.rate, "nonzero_rate": row.rate}
    return asdict(row) | rates | {"mean_rate": row.mean_rate, "mean_nonzero_rate": row.mean_rate}


def write_csv(path: Path, rows: list[FiringRow]) -> None:
    """One line per tensor and time step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tensor", "paper_name", "time_step", "spikes", "nonzero", "elements", "rate", "nonzero_rate"])
        for row in rows:
            for t, (spikes, nonzero) in enumerate(zip(row.spikes, row.nonzero, strict=True)):
                counts = [spikes, nonzero, row.elements_per_step]
                writer.writerow([row.name, row.paper_name, t + 1, *counts, row.rate[t], row.rate[t]])
