"""What is known of a model beyond what can be counted of any: its family, the models of one publication.

This file alone imports the packages of the families. A further family has what `Family` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from utils.measure.energy import Cost, EnergyReport
from utils.measure.models.workload import Product
from utils.measure.sdt.family import SdtFamily
from utils.measure.sdt.names import map_tensors as map_tensors_of_v1
from utils.measure.sdt.names import paper_name
from utils.measure.sdt.rates_file import charge as published_rates
from utils.measure.sdt_v2.family import SdtV2Family
from utils.measure.sdt_v2.family import map_tensors as map_tensors_of_v2
from utils.measure.synapse_counts import Counts
from utils.measure.twin import Comparison

__all__ = ["Comparison", "Family", "family_of", "map_tensors", "paper_name", "published_rates"]

Rates = Mapping[str, Any]  # name of a spike tensor -> rate per step


class Shape(Protocol):
    """The sizes of a model."""

    @property
    def title(self) -> str: ...
    @property
    def description(self) -> str: ...
    def as_dict(self) -> dict[str, Any]: ...
    def residual_additions_per_step(self) -> int: ...


class Family(Protocol):
    """The models of one publication, of one size.

    paper_mode: what the energy mode `paper` charges; empty where there is none, for the reason `why_no_paper`.
    sums: name -> module whose output is added up without weights; `sum_formula` says what `formula` charges for it.
    form: which form of the model it is, where there are several.
    """

    paper_mode: str
    why_no_paper: str
    sum_formula: str

    @property
    def shape(self) -> Shape: ...
    @property
    def sums(self) -> Mapping[str, nn.Module]: ...
    @property
    def form(self) -> str: ...
    def paper_name(self, name: str) -> str:
        """The paper's name of a spike tensor or layer; empty where it has none."""

    def why_not(self, counts: Counts, rates: Rates) -> str:
        """Why a model that was counted so does not belong here after all; empty if it does."""

    def sum_rates(self, rates: Rates) -> dict[str, list[float]]:
        """For each of `sums`, the rate per step that the mode `formula` charges."""

    def paper_energy(self, rates: Rates, once: bool, cost: Cost) -> EnergyReport | None:
        """Energy per sample by the paper's formulas; `once`: the first conv is charged for one step."""

    def twin_products(self, convention: str) -> list[Product]:
        """What the network as an ANN computes beside the layers of this one."""

    def compare(self, report: EnergyReport, convention: str) -> Comparison:
        """The network as an ANN, beside one accounting of the spiking one."""

    def notes(self, rates: Rates) -> Sequence[str]:
        """What else a reader should know."""


def family_of(model: nn.Module, height: int, width: int) -> Family | None:
    """The family that a model belongs to by its sizes, for images of height x width; None if there is none.

    Whether its layers are that family's too shows when it runs: `Family.why_not`.
    """
    return SdtFamily.of(model, height, width) or SdtV2Family.of(model, height, width)


def map_tensors(names: Iterable[str]) -> list[tuple[str, str]]:
    """Of the spike tensors with these names, the pairs that attention maps show: before the mask or the attention, and
    after it."""
    names = list(names)
    return map_tensors_of_v1(names) or map_tensors_of_v2(names)
