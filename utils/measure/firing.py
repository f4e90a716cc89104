"""Firing rates, counted in integers from outside the model and divided once.

The rate of a spike tensor at step t is its number of spikes over its number of elements, over all samples of all
batches and processes (paper, supplement S1). The paper and the published code name the same tensors differently;
every row carries both names.

Legend: T time steps, B batch.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.measure.synapse_counts import count_values
from utils.report.tables import Cells
from utils.run.distributed import Process
from utils.run.hooks import ForwardHook, Recorder, hooked

_STAGE_NAMES = {"": "Conv1", "1": "Conv2", "2": "Conv3", "3": "Conv4"}
# The code's q is the paper's V_S; the code's k and v are its Q_S and K_S (supplement, table S1).
_BLOCK_NAMES = {
    "first_lif": "input",
    "q_lif": "V_S",
    "k_lif": "Q_S",
    "v_lif": "K_S",
    "kv_before": "Q_S * K_S",
    "kv": "g(Q_S, K_S)",
    "x_after_qkv": "SDSA output, masked V_S",
    "fc1_lif": "MLP layer 1",
    "fc2_lif": "MLP layer 2",
}


def paper_name(name: str) -> str:
    """The paper's name of a spike tensor that the published code calls `name`; empty where it has none."""
    if match := re.fullmatch(r"MS_SPS_lif(\d?)", name):
        return f"SPS {_STAGE_NAMES[match[1]]}"
    if match := re.fullmatch(r"MS_(?:SSA|MLP)_Conv(\d+)_(\w+)", name):
        return f"block {int(match[1]) + 1} {_BLOCK_NAMES[match[2]]}"
    return "head FC" if name == "head_lif" else ""


@dataclass(frozen=True)
class FiringRow:
    """The spikes of one tensor at each time step, over all samples."""

    name: str
    paper_name: str
    elements_per_step: int
    spikes: list[int]
    nonzero: list[int]

    @property
    def rate(self) -> list[float]:
        """Firing rate per time step, 0 to 1 for spikes."""
        return [count / self.elements_per_step for count in self.spikes]

    @property
    def nonzero_rate(self) -> list[float]:
        """Share of elements that are not zero, per time step; equals `rate` for spikes."""
        return [count / self.elements_per_step for count in self.nonzero]

    @property
    def mean_rate(self) -> float:
        return sum(self.spikes) / (self.elements_per_step * len(self.spikes))

    @property
    def mean_nonzero_rate(self) -> float:
        return sum(self.nonzero) / (self.elements_per_step * len(self.nonzero))


class FiringRecorder(Recorder):
    """Counts the spikes in the outputs of some modules while it is entered.

    Nothing of a batch stays alive after it: two integers per tensor and time step are kept.

    Args:
        sources: name -> module whose output `[T, B, ...]` is a spike tensor (`model.spike_sources()`).

    Raises:
        ValueError: a batch with another number of time steps than those before.
    """

    def __init__(self, sources: Mapping[str, nn.Module]) -> None:
        self._sources = dict(sources)
        self._spikes: dict[str, Tensor] = {}
        self._nonzero: dict[str, Tensor] = {}
        self._elements: dict[str, int] = dict.fromkeys(self._sources, 0)

    def _attached(self) -> AbstractContextManager[None]:
        return hooked(self._sources, self._hook)

    def _hook(self, name: str) -> ForwardHook:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            T = output.shape[0]
            nonzero, spikes, _ = count_values(output.detach().flatten(0, 1))  # each [T * B]
            nonzero, spikes = nonzero.view(T, -1).sum(dim=1), spikes.view(T, -1).sum(dim=1)
            if name not in self._spikes:
                self._spikes[name] = torch.zeros_like(spikes)
                self._nonzero[name] = torch.zeros_like(nonzero)
            elif len(self._spikes[name]) != T:
                raise ValueError(f"{name}: this batch has {T} time steps, those before {len(self._spikes[name])}")
            self._spikes[name] += spikes
            self._nonzero[name] += nonzero
            self._elements[name] += output.numel() // T

        return count

    def rows(self, process: Process) -> list[FiringRow]:
        """One row per tensor in order of computation, summed over all processes (each must call this).

        Raises:
            ValueError: a tensor whose values are not all 0 or 1, or one that was never computed.
        """
        # A process without samples takes part with zeros, and learns from the others how many steps there are.
        mine = [len(self._spikes[name]) if name in self._spikes else 0 for name in self._sources]
        with_data, *step_sums = process.sum(any(mine), *mine)
        rows = []
        for name, step_sum in zip(self._sources, step_sums, strict=True):
            if not step_sum:
                raise ValueError(f"{name}: no batch passed while its spikes were counted")
            zeros = torch.zeros(int(step_sum / with_data), dtype=torch.int64)
            spikes = process.sum_tensor(self._spikes.get(name, zeros)).tolist()
            nonzero = process.sum_tensor(self._nonzero.get(name, zeros)).tolist()
            (total,) = process.sum(self._elements[name])
            if spikes != nonzero:
                raise ValueError(f"{name}: its values are not all 0 or 1, so they cannot be counted as spikes")
            rows.append(FiringRow(name, paper_name(name), int(total), spikes, nonzero))
        return rows


def rate_cells(rows: Sequence[FiringRow]) -> Cells:
    """Header and rows of the firing rates: per time step, their mean, and the mean non-zero rate."""
    steps = len(rows[0].spikes)
    header = ["tensor (code)", "paper", *(f"t={t + 1}" for t in range(steps)), "mean", "non-zero"]
    body = [
        [row.name, row.paper_name, *(f"{rate:.4f}" for rate in [*row.rate, row.mean_rate, row.mean_nonzero_rate])]
        for row in rows
    ]
    return header, body


def as_dict(row: FiringRow) -> dict[str, Any]:
    """Counts and rates of one tensor, as report.json has them."""
    rates = ("rate", "nonzero_rate", "mean_rate", "mean_nonzero_rate")
    return asdict(row) | {name: getattr(row, name) for name in rates}


def write_csv(path: Path, rows: list[FiringRow]) -> None:
    """One line per tensor and time step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tensor", "paper_name", "time_step", "spikes", "nonzero", "elements", "rate", "nonzero_rate"])
        for row in rows:
            for t, (spikes, nonzero) in enumerate(zip(row.spikes, row.nonzero, strict=True)):
                counts = [spikes, nonzero, row.elements_per_step]
                writer.writerow([row.name, row.paper_name, t + 1, *counts, row.rate[t], row.nonzero_rate[t]])
