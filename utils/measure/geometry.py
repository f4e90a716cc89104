"""How a convolution moves over its input, and so how many products each place of the input takes part in."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """A convolution without its weights; one number per axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @staticmethod
    def of(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
        return Geometry(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)

    def _reach(self, axis: int) -> int:
        return self.dilation[axis] * (self.kernel_size[axis] - 1)

    def _padding(self, axis: int) -> tuple[int, int]:
        """Before and after the input."""
        if not isinstance(self.padding, str):
            return self.padding[axis], self.padding[axis]
        before = self._reach(axis) // 2 if self.padding == "same" else 0
        return before, self._reach(axis) - before if self.padding == "same" else 0

    def outputs(self, axis: int, size: int) -> int:
        """Places of the output along an axis, for an input of `size`."""
        before, after = self._padding(axis)
        if self.transposed:
            return (size - 1) * self.stride[axis] - before - after + self._reach(axis) + self.output_padding[axis] + 1
        return (size + before + after - self._reach(axis) - 1) // self.stride[axis] + 1

    def reached(self, axis: int, places: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Where inputs at `places` are added through the weight at `offset`, and whether there is such a place; it may
        lie outside of the output."""
        before, _ = self._padding(axis)
        if self.transposed:
            target = places * self.stride[axis] - before + offset * self.dilation[axis]
            return target, torch.ones_like(target, dtype=torch.bool)
        moved = places + before - offset * self.dilation[axis]
        return moved.div(self.stride[axis], rounding_mode="floor"), moved % self.stride[axis] == 0

    def taps(self, axis: int, size: int) -> Tensor:
        """For each place along an axis of `size`, how many pairs of an output and a weight there are that use it."""
        before, after = self._padding(axis)
        repeats = self.mode != "zeros"  # then places of the padding stand for places inside
        places = torch.arange(-before, size + after) if repeats else torch.arange(size)
        taps, outputs = torch.zeros(len(places), dtype=torch.float64), self.outputs(axis, size)
        for offset in range(self.kernel_size[axis]):
            target, valid = self.reached(axis, places, offset)
            taps += valid & (target >= 0) & (target < outputs)
        if not repeats:
            return taps
        if self.mode == "circular":
            inside = places % size
        elif self.mode == "replicate":
            inside = places.clamp(0, size - 1)
        else:  # reflect
            inside = size - 1 - (size - 1 - places.abs()).abs()
        return torch.zeros(size, dtype=torch.float64).index_add(0, inside, taps)

    @functools.cache  # noqa: B019 -- a few dozen sizes per model, and each is needed for every batch
    def place_taps(self, size: tuple[int, ...]) -> Tensor:
        """For each place of an input of `size`, how many products per channel it takes part in; flat, float64, CPU."""
        taps = torch.ones(1, dtype=torch.float64)
        for axis, n in enumerate(size):
            taps = torch.outer(taps, self.taps(axis, n)).flatten()
        return taps
