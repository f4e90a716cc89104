"""What a network does besides synaptic operations: rows that are off by default and never part of the total.

Their prices are conventions, stated in each row: no publication of this model charges them.
"""

from __future__ import annotations

from collections.abc import Iterable

from utils.measure.energy import Cost, EnergyRow, charged_once
from utils.measure.synapse_counts import Counts

EXTRAS = ("neurons", "residual", "batchnorm", "memory")


def extra_rows(
    names: Iterable[str],
    counts: Counts,
    cost: Cost,
    *,
    residual_additions: int | None,
    memory_pJ_per_byte: float,
    first_conv: str = "per_step",
) -> list[EnergyRow]:
    """One row per name in `EXTRAS`, per sample.

    Args:
        first_conv: `once` where the first layer is charged for one step; it and its BatchNorm then run once here too.
        residual_additions: additions of shortcuts in one time step; None if they are not known.

    Raises:
        ValueError: an unknown name, or `residual` without a number of additions.
    """
    rows: list[EnergyRow] = []

    def add(kind: str, operations: float, price: float, charged: str) -> None:
        rows.append(EnergyRow(name, kind, float(operations), operations * price, charged, type="extra"))

    T, once = counts.time_steps, first_conv == "once" and charged_once(counts)
    for name in names:
        if name == "neurons":
            add("update", T * sum(counts.neurons_per_step.values()), cost.mac, "one MAC per neuron and step")
        elif name == "residual":
            if residual_additions is None:
                raise ValueError("extra 'residual' needs a model of a known family, whose shortcuts can be counted")
            add("AC", T * residual_additions, cost.ac, "one addition per element of a membrane shortcut")
        elif name == "batchnorm":
            charged = "one MAC per output; none once folded into the conv"
            outputs = list(counts.norms_per_step.values())  # in the order in which they run
            spared = outputs[0] if once and outputs[:1] == [counts.layers[0].outputs_per_step] else 0
            add("MAC", T * sum(outputs) - (T - 1) * spared, cost.mac, charged)
        elif name == "memory":
            charged = "each layer and step: weights read, inputs read (1 bit per spike), outputs written, once"
            add("byte", memory_bytes(counts, cost, once), memory_pJ_per_byte, charged)
        else:
            raise ValueError(f"extra {name!r} is not one of {', '.join(EXTRAS)}")
    return rows


def memory_bytes(counts: Counts, cost: Cost, once: bool = False) -> float:
    """Bytes that one sample moves if everything a layer needs in a step is moved exactly once. `once`: the first layer
    runs in one step only."""
    wide = cost.bytes_per_value
    moved = 0.0
    for place, layer in enumerate(counts.layers):
        inputs = layer.inputs_per_step * (1 / 8 if layer.is_binary else wide)
        steps = 1 if once and place == 0 else layer.steps
        moved += steps * (inputs + wide * (layer.weights + layer.outputs_per_step))
    return moved
