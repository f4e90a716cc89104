"""The models of energy: what a spiking network and its twins cost, in pJ by part.

Each prices the same counts (`workload`); docs/energy.md writes the equations out. Legend: T time steps, b bits of an
activation of the quantised twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from utils.measure.hardware import Hardware
from utils.measure.models import lemaire
from utils.measure.models.workload import Twin, Workload

Parts = dict[str, float]  # pJ


@dataclass(frozen=True)
class Model:
    """One model of energy, with what it needs of a hardware preset."""

    name: str
    counts: str  # what it prices, in words
    source: str
    needs: tuple[str, ...]
    snn: Callable[[Workload, Hardware], Parts]
    ann: Callable[[Twin, Hardware], Parts]

    def why_not(self, hardware: Hardware) -> str:
        """Which figures the preset lacks; empty if none."""
        missing = [name for name in self.needs if getattr(hardware, name) is None]
        return f"preset {hardware.name} has no {', '.join(missing)}" if missing else ""


def _compute_snn(work: Workload, hardware: Hardware) -> Parts:
    pJ = sum(one.compute_pJ for one in work.layers) + sum(one.compute_pJ for one in work.sums)
    return {"operations": pJ}


def _compute_ann(twin: Twin, hardware: Hardware) -> Parts:
    pJ = sum(one.macs * hardware.product_pJ(twin.bits_into(one)) for one in twin.layers)
    pJ += sum(one.macs * hardware.product_pJ(None if one.elementwise else twin.bits) for one in twin.products)
    return {"operations": pJ}


def _flat_snn(work: Workload, hardware: Hardware) -> Parts:
    """Each layer and step reads its weights and inputs once and writes its outputs once; each neuron and step reads and
    writes its potential."""
    price, wide = hardware.memory_pj_per_byte, hardware.bytes_of()
    assert price is not None
    weights = sum(one.passes * one.weights * wide for one in work.layers)
    moved = sum(
        one.passes * (one.inputs * (1 / 8 if one.spiking else wide) + one.outputs * wide) for one in work.layers
    )
    moved += sum(one.passes * one.elements / 8 for one in work.sums)
    state = work.time_steps * 2 * wide * sum(one.neurons for one in work.neurons)
    return _compute_snn(work, hardware) | {
        "weights": weights * price,
        "activations": moved * price,
        "state": state * price,
    }


def _flat_ann(twin: Twin, hardware: Hardware) -> Parts:
    price, narrow = hardware.memory_pj_per_byte, hardware.bytes_of(twin.bits)
    assert price is not None
    weights = sum(one.weights * hardware.bytes_of() for one in twin.layers)
    moved = sum(one.inputs * hardware.bytes_of(twin.bits_into(one)) + one.outputs * narrow for one in twin.layers)
    moved += sum((one.inputs + one.outputs) * narrow for one in twin.products)
    return _compute_ann(twin, hardware) | {"weights": weights * price, "activations": moved * price}


MODELS = {
    one.name: one
    for one in (
        Model(
            "compute",
            "operations alone",
            "Yao et al., Spike-driven Transformer, NeurIPS 2023, supplement S1",
            (),
            _compute_snn,
            _compute_ann,
        ),
        Model(
            "flat",
            "operations, and each byte moved once per layer and step at one price",
            "STEP, OpenReview SzwU2XrXIS, table 9 (price of a byte)",
            ("memory_pj_per_byte",),
            _flat_snn,
            _flat_ann,
        ),
        Model(
            "lemaire",
            "operations, addressing, and an SRAM access per use of a weight, input, output and potential",
            "Lemaire et al., An analytical estimation of spiking neural networks energy efficiency, ICONIP 2022, "
            "arXiv 2210.13107",
            ("sram_pj", "sram_pj_per_bit", "fifo_words"),
            lemaire.snn,
            lemaire.ann,
        ),
    )
}
