"""What is known of a model beyond what can be counted of any: its family, the models of one publication.

This file alone imports the packages of the families (`utils.measure.sdt`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from utils.measure.energy import Cost, EnergyReport
from utils.measure.sdt import names, rates_file
from utils.measure.sdt.ann_twin import AnnTwin, AttentionComparison
from utils.measure.sdt.family import SdtFamily
from utils.measure.synapse_counts import Counts


class Family(Protocol):
    """One model of a known family. Rates are keyed by the names of spike tensors, one value per time step."""

    title: str  # family and size, as a row of a table names it
    description: str  # sizes in words
    sizes: dict[str, Any]  # for report.json
    sums: dict[str, nn.Module]  # name -> module whose output is added up without weights
    residual_additions: int  # additions of shortcuts, per sample and time step
    paper_mode: str  # what the mode `paper` charges, in words

    def paper_name(self, name: str) -> str:
        """The paper's name of a spike tensor or layer; empty where it has none."""

    def why_not(self, counts: Counts, rates: Mapping[str, list[float]]) -> str:
        """Why a model that was counted so does not belong here after all; empty if it does."""

    def sum_rates(self, rates: Mapping[str, list[float]]) -> dict[str, list[float]]:
        """For each of `sums`, the rate per step that the mode `formula` charges."""

    def paper_energy(self, rates: Mapping[str, list[float]], once: bool, cost: Cost) -> EnergyReport:
        """Energy per sample by the paper's formulas; `once`: the first conv is charged for one step."""

    def compare(self, report: EnergyReport, convention: str) -> tuple[AnnTwin, AttentionComparison]:
        """The ANN twin, and self-attention alone, beside the spiking network."""


def family_of(model: nn.Module, height: int, width: int) -> Family | None:
    """The family that a model belongs to by its sizes, for images of height x width; None if there is none.

    Whether its layers are that family's too shows when it runs: `Family.why_not`.
    """
    return SdtFamily.of(model, height, width)


def map_tensors(tensors: Iterable[str]) -> list[tuple[str, str]]:
    """Of the spike tensors with these names, the pairs that attention maps show, one per block."""
    return names.map_tensors(tensors)


def published_rates(path: str, cost: Cost) -> rates_file.ChargedRates:
    """The energy of a file of firing rates. Raises UserError for a file that does not fit."""
    return rates_file.charge(path, cost)
