"""Every model of energy on both sides: totals, how many times the twins cost, and the break-even firing rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.measure.energy import PJ_PER_MJ
from utils.measure.hardware import Hardware
from utils.measure.models.price import MODELS, Model, Parts
from utils.measure.models.workload import Product, Twin, Workload, quantised_bits


@dataclass(frozen=True)
class BreakEven:
    """The firing rate at which a spiking network costs as much as a twin; None where no rate between 0 and 1 is."""

    rate: float | None
    cheaper: str  # where the spiking network is: at any rate, at no rate, below the rate


@dataclass(frozen=True)
class ModelTotal:
    """One model of energy: pJ per sample by part, of the spiking network and, where they are known, of its twins."""

    model: Model
    snn: Parts
    silent: float  # pJ of the spiking network, had none of its neurons fired
    ann: Parts | None
    quantised: Parts | None
    time_steps: int
    bits: int  # of the quantised twin's activations
    firing_rate: float | None

    @property
    def snn_pJ(self) -> float:
        return sum(self.snn.values())

    def twin_pJ(self, quantised: bool = False) -> float | None:
        parts = self.quantised if quantised else self.ann
        return None if parts is None else sum(parts.values())

    def ratio(self, quantised: bool = False, rate: float | None = None) -> float | None:
        """Energy of the twin over that of the spiking network, also had it fired at another mean `rate`."""
        twin, snn = self.twin_pJ(quantised), self.snn_pJ
        if rate is not None and self.firing_rate:
            snn = self.silent + (snn - self.silent) * rate / self.firing_rate
        return twin / snn if twin is not None and snn else None

    def break_even(self, quantised: bool = False) -> BreakEven | None:
        """Mean firing rate at which both cost the same, if every neuron fired in the same proportion more or less.

        All models are linear in it. None without a twin, or where nothing fires.
        """
        twin, by_spikes = self.twin_pJ(quantised), self.snn_pJ - self.silent
        if twin is None or not self.firing_rate or by_spikes <= 0:
            return None
        rate = (twin - self.silent) / by_spikes * self.firing_rate
        if rate <= 0:
            return BreakEven(None, "at no rate")
        return BreakEven(rate, "below the rate") if rate < 1 else BreakEven(None, "at any rate")

    def as_dict(self) -> dict[str, Any]:
        """As report.json has it."""
        found: dict[str, Any] = {"model": self.model.name, "counts": self.model.counts, "source": self.model.source}
        found |= {"snn_mJ": self.snn_pJ / PJ_PER_MJ, "snn_parts_mJ": _mJ(self.snn), "firing_rate": self.firing_rate}
        found["quantised_bits"] = self.bits
        for quantised, parts, name in ((False, self.ann, "ann"), (True, self.quantised, "quantised_ann")):
            pJ, even = self.twin_pJ(quantised), self.break_even(quantised)
            found |= {
                f"{name}_mJ": None if pJ is None else pJ / PJ_PER_MJ,
                f"{name}_parts_mJ": _mJ(parts),
                f"{name}_ratio": self.ratio(quantised),
                f"{name}_break_even_rate": even and even.rate,
                f"{name}_snn_is_cheaper": even and even.cheaper,
            }
        return found


def _mJ(parts: Parts | None) -> dict[str, float] | None:
    return None if parts is None else {name: pJ / PJ_PER_MJ for name, pJ in parts.items()}


def model_totals(
    chosen: str, work: Workload, products: Sequence[Product] | None, hardware: Hardware, firing_rate: float | None
) -> tuple[list[ModelTotal], list[str]]:
    """The totals of the models, and notes on those that the hardware preset lacks figures for.

    Args:
        chosen: a name of `MODELS`, or `all`.
        products: of the twin's attention; None for a network whose twin is not known.
        firing_rate: the mean over all spike tensors, None where there is none.
    """
    twin = None if products is None or not work.layers else Twin(work.layers, list(products), work.norms)
    bits = quantised_bits(work.time_steps)
    totals, notes = [], []
    for model in MODELS.values() if chosen == "all" else [MODELS[chosen]]:
        if why := model.why_not(hardware):
            notes.append(f"left out: energy model {model.name}, since {why}")
            continue
        totals.append(
            ModelTotal(
                model=model,
                snn=model.snn(work, hardware),
                silent=sum(model.snn(work.scaled(0), hardware).values()),
                ann=None if twin is None else model.ann(twin, hardware),
                quantised=None if twin is None else model.ann(replace(twin, bits=bits), hardware),
                time_steps=work.time_steps,
                bits=bits,
                firing_rate=firing_rate,
            )
        )
    return totals, notes
