"""The Spike-driven Transformer (V1) as a family of models."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from utils.errors import listed
from utils.measure.energy import Cost, EnergyReport
from utils.measure.models.workload import Product
from utils.measure.sdt.ann_twin import attention_products, compare
from utils.measure.sdt.names import TOKEN_SUM, layer, paper_name, token_sums
from utils.measure.sdt.paper_energy import PAPER_READING, Rates, paper_energy, rate_names, token_sum_rate
from utils.measure.sdt.shape import SdtShape
from utils.measure.synapse_counts import Counts
from utils.measure.twin import Comparison


class SdtFamily:
    """A Spike-driven Transformer of one size. Rates are keyed by the names of spike tensors, one value per step."""

    # What the mode `paper` charges, and what `formula` charges for `sums`.
    paper_mode = (
        "paper: the conventions of the paper's supplement S1, which charges q, k and v at the rate of their outputs."
    )
    why_no_paper = ""
    sum_formula = "N D x (rate of Q_S + rate of K_S)"
    form = ""  # there is one only
    paper_name = staticmethod(paper_name)

    def __init__(self, shape: SdtShape, model: nn.Module) -> None:
        self.shape = shape
        self.sums = token_sums(model)  # name -> module whose output is added up without weights

    @staticmethod
    def of(model: nn.Module, height: int, width: int) -> SdtFamily | None:
        shape = SdtShape.of(model, height, width)
        return SdtFamily(shape, model) if shape else None

    def why_not(self, counts: Counts, rates: Rates) -> str:
        """Why a model that was counted so does not belong here after all; empty if it does."""
        expected = self.shape.macs()
        counted = {layer.name: layer.macs_per_step for layer in counts.layers}
        wrong = [
            f"{name}: {counted.get(name, 'no')} MACs per step instead of {expected.get(name, 'none')}"
            for name in expected | counted
            if expected.get(name) != counted.get(name)
        ]
        if wrong:
            return f"it runs other layers than an {self.shape.title} ({listed(wrong, 3)})"
        if len(counts.sums) != self.shape.depths:
            return "its attention does not sum the products of k and v over tokens"
        missing = [name for name in rate_names(self.shape) if name not in rates]
        return f"it has no spike tensor {listed(missing, 3)}" if missing else ""

    def sum_rates(self, rates: Rates) -> dict[str, list[float]]:
        """For each of `sums`, the rate per step that the mode `formula` charges."""
        return {layer(block, TOKEN_SUM): token_sum_rate(block, rates) for block in range(self.shape.depths)}

    def paper_energy(self, rates: Rates, once: bool, cost: Cost) -> EnergyReport:
        """Energy per sample by the paper's formulas; `once`: the first conv is charged for one step."""
        return paper_energy(self.shape, rates, replace(PAPER_READING, first="once") if once else PAPER_READING, cost)

    def twin_products(self, convention: str) -> list[Product]:
        """What the network as an ANN computes beside the layers of this one."""
        return attention_products(self.shape, convention)

    def compare(self, report: EnergyReport, convention: str) -> Comparison:
        """The network as an ANN, beside one accounting of the spiking one."""
        return compare(self.shape, report, convention)

    def notes(self, rates: Rates) -> list[str]:
        return []
