"""The membrane potentials of a forward pass, as each neuron compares them with its threshold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Potentials = list[tuple[float, list[Tensor]]]  # threshold, and the potentials [B, *] at each time step


@contextmanager
def recorded(model: nn.Module) -> Iterator[Potentials]:
    """While it is open, forward passes of `model`, which must be plain, fill the list: an entry for each neuron.

    A neuron of the user's own counts where it fires through `neuronal_fire`, as SpikingJelly's do.
    """
    found: Potentials = []
    nodes: list[Any] = [m for m in model.modules() if hasattr(m, "neuronal_fire") and hasattr(m, "v_threshold")]

    def watch(node: Any) -> None:
        steps: list[Tensor] = []
        found.append((float(node.v_threshold), steps))
        fire = node.neuronal_fire

        def fire_and_note() -> Tensor:
            steps.append(node.v.detach().clone())
            spikes: Tensor = fire()
            return spikes

        node.neuronal_fire = fire_and_note

    for node in nodes:
        watch(node)
    try:
        yield found
    finally:
        for node in nodes:
            del node.neuronal_fire
