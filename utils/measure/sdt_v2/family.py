"""Spike-driven Transformer V2 as a family of models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from utils.errors import listed
from utils.measure.energy import Cost, EnergyReport
from utils.measure.models.workload import Product
from utils.measure.sdt_v2.shape import SdtV2Shape
from utils.measure.synapse_counts import Counts
from utils.measure.twin import Comparison

Rates = Mapping[str, Sequence[float]]


class SdtV2Family:
    """A Spike-driven Transformer V2 of one size, as trained or merged."""

    paper_mode = ""  # there is none, see `why_no_paper`
    why_no_paper = (
        "the formulas of V2's energy stand in the paper's appendix, which was not available to this project, and the "
        "published code has none"
    )
    sum_formula = ""
    sums: Mapping[str, nn.Module] = {}  # the two products of attention are counted where they are computed

    def __init__(self, shape: SdtV2Shape) -> None:
        self.shape = shape

    @staticmethod
    def of(model: nn.Module, height: int, width: int) -> SdtV2Family | None:
        shape = SdtV2Shape.of(model, height, width)
        return SdtV2Family(shape) if shape else None

    @property
    def form(self) -> str:
        return "merged" if self.shape.merged else "as trained"

    @staticmethod
    def paper_name(name: str) -> str:
        """The paper's names are not known; the published code's paths are used."""
        return ""

    def why_not(self, counts: Counts, rates: Rates) -> str:
        """Why a model that was counted so does not belong here after all; empty if it does."""
        expected = self.shape.macs() | self.shape.attention_macs()
        counted = {layer.name: layer.macs_per_step for layer in counts.layers}
        wrong = [
            f"{name}: {counted.get(name, 'no')} MACs per step instead of {expected.get(name, 'none')}"
            for name in expected | counted
            if expected.get(name) != counted.get(name)
        ]
        return f"it runs other layers than an {self.shape.title} ({listed(wrong, 3)})" if wrong else ""

    def sum_rates(self, rates: Rates) -> dict[str, list[float]]:
        return {}

    def paper_energy(self, rates: Rates, once: bool, cost: Cost) -> EnergyReport | None:
        """None, see `why_no_paper`."""
        return None

    def twin_products(self, convention: str) -> list[Product]:
        """Nothing: the two products of its attention are among the layers that are counted, the same in the twin."""
        return []

    def compare(self, report: EnergyReport, convention: str) -> Comparison:
        """The network as an ANN, beside one accounting of the spiking one. It has the layers of the same form, and the
        same two products in its attention; `convention` is for V1, whose twin has another attention."""
        attention = self.shape.attention_macs()
        macs = sum(self.shape.macs().values()) + sum(attention.values())
        of_layers = {
            name: count
            for name, count in self.shape.macs().items()
            if ".attn." in name and not name.partition(".attn.")[2].startswith("proj_conv")
        }
        blocks, names = sum(self.shape.depths), of_layers | attention
        spiking = sum(row.energy_pJ for row in report.rows if row.name in names) / blocks
        twin = report.cost.mac * sum(names.values()) / blocks
        formula = "2 N C d (k^T v, then q times that)"
        return Comparison("linear", formula, macs, macs * report.cost.mac, report.total_pJ, twin, spiking)

    def notes(self, rates: Rates) -> list[str]:
        """The mean firing rate of each stage: of its spike tensors, each counted once."""
        stages: dict[str, list[float]] = {}
        for name, values in rates.items():
            stages.setdefault(_stage(name), []).append(sum(values) / len(values))
        means = ", ".join(f"{stage} {sum(found) / len(found):.4f}" for stage, found in stages.items())
        return [f"mean firing rate by stage, each spike tensor counted once: {means}"] if means else []


def _stage(name: str) -> str:
    """The stage of a spike tensor; downsampling belongs to the stage that it leads to."""
    part = name.split(".")[0]
    number = part.removeprefix("downsample").removeprefix("ConvBlock").removeprefix("block")[:1]
    return f"stage {number}" if number.isdigit() else "head"


def map_tensors(names: Iterable[str]) -> list[tuple[str, str]]:
    """Of the spike tensors with these names, the pairs that attention maps show: q and the attention's output."""
    known = set(names)
    pairs = ((name, f"{name.removesuffix('q_lif')}attn_lif") for name in names if name.endswith(".attn.q_lif"))
    return [pair for pair in pairs if pair[1] in known]
