"""A network as a list of layers for module/kernels/csrc/sparse, which computes all of them in one call.

Legend: T time steps, N images at each step, C channels, H x W feature map, P = T*N*H*W pixels.
Spikes are bits `[P, ceil(C/64)]` of 64-bit words, values float32 `[P, C]`; both in the order T, N, H, W.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from module.folding import folded
from module.sparse import library
from module.sparse.library import NONE, Layer
from module.sparse.ops import pack_weight, unpack_spikes

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Map:
    """A feature map: where it begins in the memory of a run (spikes or values), its sizes, and which layer made it."""

    place: int
    T: int
    N: int
    H: int
    W: int
    C: int
    source: int = NONE

    @property
    def pixels(self) -> int:
        return self.T * self.N * self.H * self.W


@dataclass
class Weights:
    """A convolution with its BatchNorm folded in. `additions` counts those of weights it did since it was built."""

    out_channels: int
    taps: int
    packed: Tensor = field(repr=False)
    bias: Tensor | None
    additions: int = 0

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.Module) -> Weights:
        return cls.of_tensors(*((exact := folded(conv, bn)).weight.detach(), exact.bias))

    @classmethod
    def of_tensors(cls, weight: Tensor, bias: Tensor | None) -> Weights:
        """`weight` `[M, C, k, k]`."""
        bias = None if bias is None else bias.detach().contiguous()
        return cls(len(weight), weight.shape[-1] ** 2, pack_weight(weight), bias)


@dataclass(frozen=True)
class Neuron:
    """What the kernels need of a LIF or parametric LIF layer."""

    decay: float
    threshold: float

    @classmethod
    def of(cls, node: Any) -> Neuron:
        decay = float(node.w.detach().float().sigmoid()) if hasattr(node, "w") else 1.0 / node.tau
        return cls(decay, float(node.v_threshold))


@dataclass(frozen=True)
class Output:
    """What a convolution gives: values, under a name, and the spikes of the neurons that these drive.

    residual: values that are added before; they may be the ones that are written.
    """

    layer: str
    values: str | None = None
    spikes: str | None = None
    neuron: nn.Module | None = None
    residual: Map | None = None


class Program:
    """Layers in the order of computation. Each method adds one, and returns the maps that it makes.

    Maps with the same name share their memory: the later one replaces the earlier one.

    Args:
        weights: name of a convolution -> its weights; their `additions` go up with each run.

    Attributes:
        layers, names: what the kernels are told, and what each layer computes: its convolutions, else its kind.
        outcomes: what each layer did in the last run, and how long that took.
    """

    def __init__(self, weights: dict[str, Weights]) -> None:
        self.weights = weights
        self.names: list[tuple[str, ...]] = []
        self.bytes = 0
        self.outcomes: list[library.Outcome] = []
        self.layers: list[Layer] = []
        self._compiled: Any = None  # the same as the kernels read it
        self._places: dict[str, tuple[int, int]] = {}

    def values(self, name: str, T: int, N: int, H: int, W: int, C: int) -> Map:
        """Memory for float32 `[T, N, H, W, C]`."""
        return Map(self._place(name, T * N * H * W * C * 4), T, N, H, W, C)

    def image(self, x: Map, T: int, output: Output) -> Map:
        """The first convolution and its neurons: `x` has T steps, or 1 for the same image at each."""
        shown = replace(x, T=T)
        layer = self._layer(library.IMAGE, shown, (output.layer,), frames=x.T)
        return self._result(layer, 0, shown, output)[1]

    def convolve(self, s: Map, *outputs: Output) -> list[tuple[Map, Map]]:
        """Convolutions of the same spikes: (values, spikes) of each output; what it does not ask for is empty."""
        layer = self._layer(library.CONVOLVE, s, tuple(output.layer for output in outputs), results=len(outputs))
        return [self._result(layer, i, s, output) for i, output in enumerate(outputs)]

    def fire(self, u: Map, name: str, neuron: nn.Module) -> Map:
        """Neurons alone, on values."""
        return self._neurons(self._layer(library.FIRE, u, ("neurons",)), 0, u, name, neuron)

    def pool_spikes(self, s: Map, name: str) -> Map:
        """3x3, stride 2, padding 1."""
        layer, made = self._layer(library.POOL_SPIKES, s, ("pool",)), replace(s, H=(s.H + 1) // 2, W=(s.W + 1) // 2)
        return self._neurons(layer, 0, made, name, None)

    def pool_values(self, u: Map, values: str, spikes: str, neuron: nn.Module) -> tuple[Map, Map]:
        """The same pool, and the neurons after it."""
        layer, made = self._layer(library.POOL_VALUES, u, ("pool",)), replace(u, H=(u.H + 1) // 2, W=(u.W + 1) // 2)
        made = self.values(values, made.T, made.N, made.H, made.W, made.C)
        layer.to[0].values = made.place
        return made, self._neurons(layer, 0, made, spikes, neuron)

    def attend(self, q: Map, k: Map, v: Map, neuron: nn.Module) -> Map:
        """Spike-driven self-attention; its result takes the place of `q`."""
        layer = self._layer(library.ATTEND, v, ("attention",), queries=q.place, keys=k.place)
        known = Neuron.of(neuron)
        layer.to[0].decay, layer.to[0].threshold = known.decay, known.threshold
        return replace(q, source=len(self.layers) - 1)

    def mean(self, u: Map, name: str) -> Map:
        """Over the pixels of each image."""
        made = self.values(name, u.T, u.N, 1, 1, u.C)
        self._layer(library.MEAN, u, ("mean",)).to[0].values = made.place
        return made

    def run(self, inputs: Map, x: Tensor) -> Tensor:
        """Compute all layers with `x`, float32 `[T, N, C, H, W]` in any layout, for `inputs`; returns the memory."""
        memory = torch.empty(self.bytes, dtype=torch.uint8)
        read(memory, inputs).copy_(x.permute(0, 1, 3, 4, 2))
        if self._compiled is None:
            self._compiled = (Layer * len(self.layers))(*self.layers)
        outcomes = library.run(library.load(), self._compiled, memory.data_ptr(), torch.get_num_threads())
        self.outcomes = list(outcomes)
        for names, done in zip(self.names, outcomes, strict=True):
            for name in names:
                if name in self.weights:
                    self.weights[name].additions += done.additions // len(names)
        return memory

    def _place(self, name: str, size: int) -> int:
        place, had = self._places.get(name, (0, -1))
        if size > had:
            place = self.bytes
            self.bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
            self._places[name] = (place, size)
        return place

    def _layer(self, kind: int, s: Map, names: tuple[str, ...], **settings: int) -> Layer:
        layer = Layer(kind=kind, T=s.T, N=s.N, H=s.H, W=s.W, C=s.C, O=s.C, input=s.place, source=s.source)
        for result in layer.to:
            result.residual = result.values = result.spikes = NONE
        for name, value in settings.items():
            setattr(layer, name, value)
        self.layers.append(layer)
        self.names.append(names)
        return layer

    def _result(self, layer: Layer, index: int, s: Map, output: Output) -> tuple[Map, Map]:
        weights, result = self.weights[output.layer], layer.to[index]
        layer.O, layer.taps = weights.out_channels, weights.taps
        result.weights = weights.packed.data_ptr()
        result.bias = None if weights.bias is None else weights.bias.data_ptr()
        result.residual = NONE if output.residual is None else output.residual.place
        made = replace(s, C=weights.out_channels)
        values = spikes = made
        if output.values is not None:
            values = self.values(output.values, made.T, made.N, made.H, made.W, made.C)
            result.values = values.place
        if output.spikes is not None:
            spikes = self._neurons(layer, index, made, output.spikes, output.neuron)
        return values, spikes

    def _neurons(self, layer: Layer, index: int, s: Map, name: str, neuron: nn.Module | None) -> Map:
        """Let the result be spikes; without neurons those of a pool."""
        place = self._place(name, s.pixels * ((s.C + 63) // 64) * 8)
        layer.to[index].spikes = place
        if neuron is not None:
            known = Neuron.of(neuron)
            layer.to[index].decay, layer.to[index].threshold = known.decay, known.threshold
        return replace(s, place=place, source=len(self.layers) - 1)


def read(memory: Tensor, u: Map) -> Tensor:
    """The values of a map `[T, N, H, W, C]` in the memory of a run."""
    part = memory[u.place : u.place + 4 * u.pixels * u.C]
    return part.view(torch.float32).view(u.T, u.N, u.H, u.W, u.C)


def read_spikes(memory: Tensor, s: Map) -> Tensor:
    """The spikes of a map, float32 `[T, N, H, W, C]`, in the memory of a run."""
    words = (s.C + 63) // 64
    bits = memory[s.place : s.place + 8 * s.pixels * words].view(torch.int64).view(s.pixels, words)
    return unpack_spikes(bits, (s.pixels, s.C, 1, 1)).view(s.T, s.N, s.H, s.W, s.C)
