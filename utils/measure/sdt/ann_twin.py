"""The ANN twin: the same layers with real values, one pass, and softmax attention. And attention against attention.

Legend: D channels of a token, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from utils.measure.energy import COSTS, PJ_PER_MJ, Cost, EnergyReport
from utils.measure.sdt.names import QKV, TOKEN_SUM, layer
from utils.measure.sdt.shape import SdtShape

# f(Q, K, V), the two matrix products of attention: as table 1 prints it (2 N N D), and as the published totals need
# it (2 N D D: 41.77 mJ for 8-512).
ATTENTION_MACS = ("printed", "paper")


def attention_macs(shape: SdtShape, convention: str = "printed") -> int:
    """Products of f(Q, K, V) of one block. Raises ValueError for an unknown convention."""
    if convention not in ATTENTION_MACS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(ATTENTION_MACS)}")
    N, D = shape.tokens, shape.channels
    return 2 * N * N * D if convention == "printed" else 2 * N * D * D


def softmax_macs(shape: SdtShape) -> int:
    """Scale (N N multiplications) and softmax (2 N N) of one block, all charged as a MAC."""
    return 3 * shape.tokens**2


def ann_macs(shape: SdtShape, convention: str = "printed") -> int:
    """Everything the twin computes for one image: all layers, position conv and head included."""
    attention = attention_macs(shape, convention) + softmax_macs(shape)
    return sum(shape.macs().values()) + shape.depths * attention


@dataclass(frozen=True)
class AnnTwin:
    """The twin's energy, and how many times that of the spiking network it is."""

    convention: str
    macs: int
    energy_pJ: float
    ratio: float | None  # None for a network without any operation

    @property
    def energy_mJ(self) -> float:
        return self.energy_pJ / PJ_PER_MJ

    @property
    def formula(self) -> str:
        return "2 N^2 D, as printed" if self.convention == "printed" else "2 N D^2, as the published totals"


def ann_twin(shape: SdtShape, spiking: EnergyReport, convention: str = "printed") -> AnnTwin:
    macs = ann_macs(shape, convention)
    energy = macs * spiking.cost.mac
    return AnnTwin(convention, macs, energy, energy / spiking.total_pJ if spiking.total_pJ else None)


@dataclass(frozen=True)
class AttentionComparison:
    """Self-attention alone, the linear layer after it left out: the mean block (the paper's table 4)."""

    convention: str
    ann_pJ: float
    spiking_pJ: float

    @property
    def ratio(self) -> float | None:
        """None where no spike enters attention."""
        return self.ann_pJ / self.spiking_pJ if self.spiking_pJ else None


def attention_twin_pJ(shape: SdtShape, convention: str = "printed", cost: Cost = COSTS["fp32"]) -> float:
    """Energy of one block's Q, K, V, f, scale and softmax in the ANN. The published 87.2 needs `paper`."""
    projections = 3 * shape.tokens * shape.channels**2
    return cost.mac * (projections + attention_macs(shape, convention) + softmax_macs(shape))


def compare_attention(shape: SdtShape, spiking: EnergyReport, convention: str = "printed") -> AttentionComparison:
    parts = {layer(block, part) for block in range(shape.depths) for part in (*QKV, TOKEN_SUM)}
    energy = sum(row.energy_pJ for row in spiking.rows if row.name in parts)
    return AttentionComparison(convention, attention_twin_pJ(shape, convention, spiking.cost), energy / shape.depths)


def compare(shape: SdtShape, spiking: EnergyReport, convention: str) -> tuple[AnnTwin, AttentionComparison]:
    """The twin and self-attention alone, in one convention."""
    return ann_twin(shape, spiking, convention), compare_attention(shape, spiking, convention)
