"""The analytical model of Lemaire et al., "An analytical estimation of spiking neural networks energy efficiency",
ICONIP 2022, arXiv 2210.13107: operations, addressing, and accesses to memories whose price grows with their size.

The paper counts a layer together with the neurons behind it. Here the neurons are counted by themselves, so that a
network may pool, add shortcuts or branch between the two; for a layer that is followed by its neurons the sum is the
same. Where the paper's equation for fully connected layers (2.4) multiplies by their inputs once more, that factor is
left out, as in both public implementations: a spike meets one weight per output.
"""

from __future__ import annotations

from utils.measure.hardware import Hardware
from utils.measure.models.workload import Layer, Norm, Twin, Workload


def snn(work: Workload, hardware: Hardware) -> dict[str, float]:
    """The spiking network, pJ by part. A layer that takes real values is charged as the ANN's, each time it runs."""
    ledger = _Ledger(hardware)
    queue = hardware.fifo_words or 0.0
    for layer in work.layers:
        if not layer.spiking:
            ledger.dense(layer, layer.passes, None, None)
            continue
        events = layer.nonzero * layer.fan_out
        ledger.operate(layer.nonzero * layer.strided_fan_out, hardware.cost.ac)  # Eq. 1.4, 2.4
        ledger.address(events)  # Eq. 16.3, 17.2
        if not layer.is_linear:
            ledger.address(2 * layer.nonzero, hardware.cost.mac)  # Eq. 16.2
        ledger.access("weights", events, layer.weights)  # Eq. 7, 8
        ledger.access("inputs and outputs", layer.nonzero, queue)  # Eq. 5
        ledger.access("potentials", 2 * events, layer.outputs)  # read and write: Eq. 9, 10, 14, 15
        if layer.bias:
            ledger.bias(layer.passes * layer.outputs, layer.weights)
    for spikes in work.sums:
        ledger.operate(spikes.nonzero, hardware.cost.ac)
        ledger.access("inputs and outputs", spikes.nonzero, queue)
        ledger.access("potentials", 2 * spikes.nonzero, spikes.elements)
    for group in work.neurons:
        updates = work.time_steps * group.neurons
        if group.leaky:
            ledger.operate(updates, hardware.cost.mac)  # Eq. 1.3, 2.3
        ledger.operate(group.spikes, hardware.cost.ac)  # resets: Eq. 1.4
        ledger.access("potentials", 2 * updates, group.neurons)
        ledger.access("inputs and outputs", group.spikes, queue)  # Eq. 13
    ledger.biases(work.norms, work.time_steps)
    return ledger.parts


def ann(twin: Twin, hardware: Hardware) -> dict[str, float]:
    """The ANN (the paper's FNN), pJ by part."""
    ledger = _Ledger(hardware)
    for layer in twin.layers:
        ledger.dense(layer, 1, twin.bits_into(layer), twin.bits)
    for product in twin.products:
        ledger.operate(product.macs, hardware.product_pJ(None if product.elementwise else twin.bits))
        if not product.elementwise:
            # A fully connected layer whose weights are activations.
            ledger.access("weights", product.macs, product.operands, twin.bits)
            ledger.access("inputs and outputs", product.inputs, product.inputs, twin.bits)
            ledger.access("inputs and outputs", product.outputs, product.outputs, twin.bits)
            ledger.address(product.inputs + product.outputs)
    ledger.biases(twin.norms, 1)
    return ledger.parts


class _Ledger:
    """pJ by part, as operations and accesses are added."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self.parts = dict.fromkeys(("operations", "addressing", "weights", "inputs and outputs"), 0.0)

    def operate(self, number: float, price: float) -> None:
        self.parts["operations"] += number * price

    def address(self, number: float, price: float | None = None) -> None:
        self.parts["addressing"] += number * (self._hardware.cost.ac if price is None else price)

    def access(self, part: str, number: float, words: float, bits: int | None = None) -> None:
        """`number` accesses to a memory of `words` words."""
        self.parts[part] = self.parts.get(part, 0.0) + number * self._hardware.access_pJ(words, bits)

    def bias(self, number: float, words: float) -> None:
        """Read and add biases (Eq. 1.2, 1.4 and 6, 7)."""
        self.operate(number, self._hardware.cost.ac)
        self.access("weights", number, words)

    def biases(self, norms: list[Norm], passes: int) -> None:
        """Of BatchNorm layers, once folded."""
        for norm in norms:
            self.bias(passes * norm.outputs, norm.channels)

    def dense(self, layer: Layer, passes: int, bits_in: int | None, bits_out: int | None) -> None:
        """A layer of the ANN: Eq. 1.1, 2.1, 3, 4, 6, 11, 12; addressing 16.1, 17.1."""
        self.operate(passes * layer.macs, self._hardware.product_pJ(bits_in))
        reads = layer.inputs if layer.is_linear else layer.macs
        self.access("inputs and outputs", passes * reads, layer.inputs, bits_in)
        self.access("weights", passes * layer.macs, layer.weights)
        self.access("inputs and outputs", passes * layer.outputs, layer.outputs, bits_out)
        self.address(passes * (layer.inputs + layer.outputs + (0 if layer.is_linear else layer.fan_out)))
        if layer.bias:
            self.bias(passes * layer.outputs, layer.weights)
