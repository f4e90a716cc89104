"""What one sample asks of a spiking network and of its twins, in the sizes that the models of energy price.

Legend: T time steps, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from utils.measure.energy import EnergyReport
from utils.measure.synapse_counts import Counts


@dataclass(frozen=True)
class Layer:
    """One Conv or Linear layer of the spiking network, per sample; sizes are of one pass."""

    name: str
    spiking: bool  # only values of 0 and 1 enter
    compute_pJ: float  # of all passes that are charged
    passes: int  # how often it is charged: T, or once
    macs: int
    inputs: int
    outputs: int
    weights: int  # biases included
    bias: bool
    nonzero: float  # inputs that are not 0, all charged passes together
    fan_out: int  # weights that one input meets, padding aside: C_out / groups x kernel size
    strided_fan_out: int  # outputs that one input reaches: C_out / groups x ceil(kernel / stride) in each direction
    is_linear: bool


@dataclass(frozen=True)
class Norm:
    """A BatchNorm layer, which folds into a bias of the layer before: one addition per output."""

    outputs: int  # of one time step
    channels: int


@dataclass(frozen=True)
class Sum:
    """Spikes that are added up without weights, per sample; `elements` of one pass."""

    name: str
    compute_pJ: float
    passes: int
    elements: int
    nonzero: float


@dataclass(frozen=True)
class Neurons:
    """One layer of spiking neurons, per sample."""

    name: str
    neurons: int
    spikes: float  # of all time steps
    leaky: bool


@dataclass(frozen=True)
class Workload:
    """A spiking network at work on one sample."""

    time_steps: int
    layers: list[Layer]
    sums: list[Sum]
    neurons: list[Neurons]
    norms: list[Norm]

    def scaled(self, factor: float) -> Workload:
        """The same network, had each of its neurons fired `factor` times as often. Real-valued inputs stay."""
        layers = [
            replace(one, compute_pJ=factor * one.compute_pJ, nonzero=factor * one.nonzero) if one.spiking else one
            for one in self.layers
        ]
        sums = [replace(one, compute_pJ=factor * one.compute_pJ, nonzero=factor * one.nonzero) for one in self.sums]
        neurons = [replace(one, spikes=factor * one.spikes) for one in self.neurons]
        return replace(self, layers=layers, sums=sums, neurons=neurons)


def workload(
    report: EnergyReport, counts: Counts, modules: Mapping[str, nn.Module], spikes: Mapping[str, float]
) -> Workload:
    """The spiking network as one accounting charges it.

    Args:
        report: of the mode `exact` or `formula`; its rows price the synaptic operations.
        counts: what it was made from.
        modules: path -> module of the model (`named_modules`), for kernel sizes, biases and leaks.
        spikes: neuron layer -> spikes per sample; the mean rate of the others stands in where one is missing.
    """
    counted = {one.name: one for one in (*counts.layers, *counts.sums)}
    sums = {one.name for one in counts.sums}
    layers, added = [], []
    for row in report.rows:
        if (one := counted.get(row.name)) is None:
            continue
        all_steps = row.exact_operations if report.mode == "exact" else row.formula_operations
        share = row.operations / all_steps if all_steps else 1.0
        passes = max(1, round(one.steps * share))  # the first conv may be charged once
        nonzero = sum(one.repeated or one.nonzero) / one.samples * passes / one.steps
        if row.name in sums:
            added.append(Sum(row.name, row.energy_pJ, passes, one.inputs_per_step, nonzero))
            continue
        module = modules.get(row.name)
        sizes = (one.macs_per_step, one.inputs_per_step, one.outputs_per_step, one.weights)
        bias = getattr(module, "bias", None) is not None
        fan_out = _fan_out(module) or (round(one.macs_per_step / max(1, one.inputs_per_step)),) * 2
        linear = isinstance(module, nn.Linear)
        spiking = row.kind == "AC"
        layers.append(
            Layer(row.name, spiking, row.energy_pJ, passes, *sizes, bias, nonzero, *fan_out, is_linear=linear)
        )
    neurons = [
        Neurons(name, size, spikes.get(name, 0.0), _leaks(modules.get(name)))
        for name, size in counts.neurons_per_step.items()
    ]
    norms = [Norm(size, getattr(modules.get(name), "num_features", 0)) for name, size in counts.norms_per_step.items()]
    return Workload(counts.time_steps, layers, added, neurons, norms)


def _fan_out(module: nn.Module | None) -> tuple[int, int] | None:
    """Weights that one input meets, and outputs that it reaches; None for another kind of layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.out_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        channels = module.out_channels // module.groups
        reached = math.prod(math.ceil(k / s) for k, s in zip(module.kernel_size, module.stride, strict=True))
        return channels * math.prod(module.kernel_size), channels * reached
    return None


def _leaks(module: nn.Module | None) -> bool:
    """Whether a neuron decays: SpikingJelly's LIF has a `tau`, its parametric LIF keeps the time constant in `w`."""
    return hasattr(module, "tau") or hasattr(module, "w")


@dataclass(frozen=True)
class Product:
    """A product of activations in a twin, as of queries and keys: `operands` is the memory one factor is read from."""

    name: str
    macs: int
    inputs: int = 0
    operands: int = 0
    outputs: int = 0
    elementwise: bool = False  # scale and softmax: real-valued also in the quantised twin


@dataclass(frozen=True)
class Twin:
    """An ANN with the layers of a spiking network on one sample: real values enter them, and each runs once."""

    layers: list[Layer]
    products: list[Product]  # of its attention
    norms: list[Norm]
    bits: int | None = None  # of an activation; None: the width of the preset

    def bits_into(self, layer: Layer) -> int | None:
        """Bits of what enters a layer. The sample itself, which enters the first one, is not quantised."""
        return None if layer is self.layers[0] else self.bits


def quantised_bits(time_steps: int) -> int:
    """Bits of an activation that takes as many values as the spikes of `time_steps` can count, 0 to T.

    Yan et al., "Reconsidering the energy efficiency of spiking neural networks", arXiv 2409.08290: ceil(log2(T + 1)).
    """
    return math.ceil(math.log2(time_steps + 1))
