"""Firing rates, counted in integers from outside the model and divided once at the end.

The rate of a spike tensor at step t is the number of its elements that are not 0 over the number of all its elements,
over all samples of all batches and processes (paper, supplement S1).

Legend: T time steps, B batch.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import listed
from utils.measure.synapse_counts import Call, Total, count_elements, sum_totals
from utils.measure.synapses import neurons_of
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
            counts = count_elements(output.unsqueeze(0) if single else output).sum(dim=2)  # [3, T]
            self._calls.setdefault(name, []).append(Call(counts, 0, 0, output.numel()))
            if not single:
                self._join_calls(name)

        return count

    def _join_calls(self, *names: str) -> None:
        for name in names:
            calls = self._calls.pop(name)
            counts = torch.cat([call.counts for call in calls if call.counts is not None], dim=1)
            total = self._totals.setdefault(name, Total())
            if total.steps not in (0, counts.shape[1]):
                raise ValueError(f"{name}: this batch has {counts.shape[1]} time steps, those before {total.steps}")
            total.add(calls, counts)

    def rows(self, process: Process, name_of: Callable[[str], str] = lambda name: "") -> list[FiringRow]:
        """One row per tensor that was computed, in order of computation, summed over all processes (each must call
        this). `name_of` gives a paper's name of a tensor.

        Raises:
            ValueError: none of the tensors was computed.
        """
        totals = sum_totals(list(self._sources), self._totals, process)
        rows = []
        for name, total in totals.items():
            if total.steps:
                nonzero, _, ones = total.counts.tolist()
                rows.append(FiringRow(name, name_of(name), total.sizes[2] // total.steps, ones, nonzero))
        if self._sources and not rows:
            raise ValueError(f"{listed(list(self._sources))}: no batch passed while spikes were counted")
        return rows


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
