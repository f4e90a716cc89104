"""A spiking network beside its ANN twin: the same layers with real values, one pass."""

from __future__ import annotations

from dataclasses import dataclass

from utils.measure.energy import PJ_PER_MJ


@dataclass(frozen=True)
class Comparison:
    """A spiking network and its twin: everything, and self-attention alone in the mean block, the linear layer after
    it left out. A ratio is None where the spiking network does nothing.

    convention: the name of the way in which the products of the twin's attention are counted.
    formula: the same in words.
    """

    convention: str
    formula: str
    macs: int  # of the twin
    energy_pJ: float
    spiking_pJ: float
    attention_pJ: float
    spiking_attention_pJ: float

    @property
    def energy_mJ(self) -> float:
        return self.energy_pJ / PJ_PER_MJ

    @property
    def ratio(self) -> float | None:
        return self.energy_pJ / self.spiking_pJ if self.spiking_pJ else None

    @property
    def attention_ratio(self) -> float | None:
        return self.attention_pJ / self.spiking_attention_pJ if self.spiking_attention_pJ else None
