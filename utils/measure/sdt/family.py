"""V1 as a family of models (`utils.measure.family.Family`)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from utils.errors import listed
from utils.measure.energy import Cost, EnergyReport
from utils.measure.sdt.ann_twin import AnnTwin, AttentionComparison, compare
from utils.measure.sdt.names import TOKEN_SUM, layer, paper_name, token_sums
from utils.measure.sdt.paper_energy import PAPER_READING, Rates, paper_energy, rate_names, token_sum_rate
from utils.measure.sdt.shape import SdtShape
from utils.measure.synapse_counts import Counts


class SdtFamily:
    """A Spike-driven Transformer with these sizes."""

    paper_mode = (
        "paper: the conventions of the paper's supplement S1, which charges q, k and v at the rate of their outputs."
    )

    def __init__(self, shape: SdtShape, model: nn.Module) -> None:
        self.shape = shape
        self.title, self.description, self.sizes = shape.title, shape.description, shape.as_dict()
        self.sums = token_sums(model)
        self.residual_additions = shape.residual_additions_per_step()

    @staticmethod
    def of(model: nn.Module, height: int, width: int) -> SdtFamily | None:
        shape = SdtShape.of(model, height, width)
        return SdtFamily(shape, model) if shape else None

    def paper_name(self, name: str) -> str:
        return paper_name(name)

    def why_not(self, counts: Counts, rates: Rates) -> str:
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
        return {layer(block, TOKEN_SUM): token_sum_rate(block, rates) for block in range(self.shape.depths)}

    def paper_energy(self, rates: Rates, once: bool, cost: Cost) -> EnergyReport:
        return paper_energy(self.shape, rates, replace(PAPER_READING, first="once") if once else PAPER_READING, cost)

    def compare(self, report: EnergyReport, convention: str) -> tuple[AnnTwin, AttentionComparison]:
        return compare(self.shape, report, convention)
