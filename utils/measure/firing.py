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
from utils.measure.synapse_counts import count_values
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

    Nothing of a batch stays alive after it: two integers per tensor and time step are kept.

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
        self._counts: dict[str, Tensor] = {}  # [2, T]: values that are not 0, values that are 1
        self._elements: dict[str, int] = dict.fromkeys(self._sources, 0)
        self._calls: dict[str, list[Tensor]] = {}  # of single-step modules in the batch that is running

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        with hooked(self._sources, self._hook), contextlib.ExitStack() as around:
            if self._model is not None:
                around.callback(self._model.register_forward_pre_hook(lambda *_: self._calls.clear()).remove)
                around.callback(self._model.register_forward_hook(lambda *_: self._join_calls()).remove)
            yield

    def _hook(self, name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() < 2:
                return
            single = self._model is not None and getattr(module, "step_mode", "m") == "s"
            steps = output.detach().unsqueeze(0) if single else output.detach()  # [T, B, ...]
            nonzero, ones, _ = count_values(steps.flatten(0, 1))  # each [T * B]
            counts = torch.stack([nonzero, ones]).view(2, len(steps), -1).sum(dim=2)
            calls = self._calls.setdefault(name, []) if single else []
            calls.append(counts)
            if not single:
                self._add(name, counts)
            if len(calls) == 1:
                self._elements[name] += output.numel() // len(steps)

        return count

    def _join_calls(self) -> None:
        for name, calls in self._calls.items():
            self._add(name, torch.cat(calls, dim=1))
        self._calls.clear()

    def _add(self, name: str, counts: Tensor) -> None:
        before = self._counts.get(name, torch.zeros_like(counts))
        if before.shape != counts.shape:
            steps = counts.shape[1]
            raise ValueError(f"{name}: this batch has {steps} time steps, those before {before.shape[1]}")
        self._counts[name] = before + counts

    def rows(self, process: Process, name_of: Callable[[str], str] = lambda name: "") -> list[FiringRow]:
        """One row per tensor that was computed, in order of computation, summed over all processes (each must call
        this). `name_of` gives a paper's name of a tensor.

        Raises:
            ValueError: none of the tensors was computed.
        """
        # A process without samples takes part with zeros, and learns from the others how many steps there are.
        mine = [self._counts[name].shape[1] if name in self._counts else 0 for name in self._sources]
        with_data, *step_sums = process.sum(any(mine), *mine)
        if self._sources and not with_data:
            raise ValueError(f"{listed(list(self._sources))}: no batch passed while spikes were counted")
        rows = []
        for name, step_sum in zip(self._sources, step_sums, strict=True):
            zeros = torch.zeros(2, int(step_sum / (with_data or 1)), dtype=torch.int64)
            nonzero, ones = process.sum_tensor(self._counts.get(name, zeros)).tolist()
            (elements,) = process.sum(self._elements[name])
            if nonzero:
                rows.append(FiringRow(name, name_of(name), int(elements), ones, nonzero))
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
