"""What is counted of one call of a convolution or linear layer, and to which time step it belongs.

Legend: T time steps, B batch, C channels, N tokens; "leading" dimensions are those before channels or features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Values that are looked at in one go: few enough to stay in the processor's cache, or many for a GPU.
_CHUNK_CPU, _CHUNK = 1 << 17, 1 << 26

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class LayerCount:
    """What entered one convolution or linear layer, over all samples. Per-step sizes are of one sample."""

    name: str
    type: str
    is_binary: bool  # every value that entered was 0 or 1
    samples: int
    macs_per_step: int  # products of the dense layer, those with padding included
    inputs_per_step: int
    outputs_per_step: int
    weights: int
    nonzero: list[int]  # per step, all samples
    synops: list[int] | None  # additions (of a spike) or products really needed; None if they were not counted

    @property
    def steps(self) -> int:
        """How often the layer runs per sample: T, or 1 if it runs before time begins."""
        return len(self.nonzero)

    @property
    def rate(self) -> list[float]:
        """Share of non-zero values among those that enter, per step."""
        return [count / (self.inputs_per_step * self.samples) for count in self.nonzero]

    @property
    def mean_rate(self) -> float:
        return sum(self.nonzero) / (self.inputs_per_step * self.samples * self.steps)


@dataclass(frozen=True)
class SumCount:
    """How many non-zero elements of a tensor were added up without weights, per step over all samples."""

    name: str
    samples: int
    inputs_per_step: int  # elements of one sample
    nonzero: list[int]
    is_binary: bool = True  # every element was 0 or 1


@dataclass(frozen=True)
class Counts:
    """Everything a `SynapseRecorder` saw, layers in order of their first call."""

    layers: list[LayerCount]
    sums: list[SumCount]
    neurons_per_step: dict[str, int]  # updates for one sample, by neuron layer
    norms_per_step: dict[str, int]  # outputs for one sample, by BatchNorm layer
    time_steps: int
    samples: int
    order: list[str]  # names of layers and sums in order of computation
    never_called: list[str]  # convolutions and linear layers that the forward pass does not use
    uncounted: list[str]  # modules with weight matrices of a kind that is not counted


@dataclass(frozen=True)
class Call:
    """One call of a module: counts stay on the device, sizes are those of the whole call."""

    counts: Tensor | None  # [3, *leading]: inputs that are not 0, operations really needed, inputs that are 1
    macs: int
    inputs: int
    outputs: int


def count_layer(module: nn.Module, x: Tensor, output: Tensor, exact: bool) -> Call:
    """The counts of one call of a layer in `COUNTED`.

    An operation is a pair of a non-zero input and a weight it meets: a spike at the border of a padded 3x3 conv
    meets fewer than nine taps per channel. With `exact` off the operations are left at 0.
    """
    taps = None
    if isinstance(module, nn.Linear):
        leading, fan_out = x.shape[:-1], module.out_features
        macs = output.numel() * module.in_features
    else:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        leading, fan_out = x.shape[: -1 - len(module.kernel_size)], module.out_channels // module.groups
        macs = output.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)
        taps = place_taps(module, tuple(x.shape[-len(module.kernel_size) :])) if exact else None
    rows = x.flatten(0, len(leading) - 1) if leading else x.unsqueeze(0)
    nonzero, ones, products = count_values(rows, taps)
    counts = torch.stack([nonzero, products * fan_out if exact else torch.zeros_like(nonzero), ones])  # [3, rows]
    return Call(counts.unflatten(1, leading or (1,)), macs, x.numel(), output.numel())


def count_values(rows: Tensor, taps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `rows` `[R, ...]`, how many values are not 0, how many are 1, and how many products those not 0
    take part in: `taps` of their place, summed over channels (`rows` is then `[R, C, *places]`). int64, `[R]`.
    """
    size = max(1, rows[:1].numel())
    step = max(1, (_CHUNK_CPU if rows.device.type == "cpu" else _CHUNK) // size)
    if taps is not None and bool(taps.eq(1).all()):
        taps = None
    weights = None if taps is None else taps.to(rows.device, torch.float64, non_blocking=True)
    # float32 holds whole numbers up to 2**24
    kind = torch.float32 if size < 2**24 else torch.float64
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    inner = tuple(range(1, rows.dim()))
    for part in rows.split(step):
        marks = torch.empty_like(part, dtype=kind)
        # Comparing into floats and summing those takes a tenth of the time that summing booleans takes.
        if weights is None:
            nonzero = products = torch.ne(part, 0, out=marks).sum(dim=inner)
        else:
            places = torch.ne(part, 0, out=marks).sum(dim=1).flatten(1)  # [r, places]: over channels
            nonzero, products = places.sum(dim=1), places.double() @ weights
        found.append((nonzero, torch.eq(part, 1, out=marks).sum(dim=inner), products))
    nonzero, ones, products = (torch.cat(counts).long() for counts in zip(*found, strict=True))
    return nonzero, ones, products


def place_taps(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, size: tuple[int, ...]) -> Tensor:
    """For each place of an input of `size`, how many products per channel it takes part in; flat, on the CPU."""
    mode = conv.padding_mode
    axes = []
    for axis, n in enumerate(size):
        k, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        if conv.padding == "valid":
            before = after = 0
        elif conv.padding == "same":
            before, after = dilation * (k - 1) // 2, dilation * (k - 1) - dilation * (k - 1) // 2
        else:
            before = after = int(conv.padding[axis])
        axes.append(_axis_taps(n, k, stride, dilation, before, after, mode))
    product = torch.tensor(axes[0])
    for taps in axes[1:]:
        product = product.unsqueeze(-1) * torch.tensor(taps)
    return product.flatten()


@functools.cache
def _axis_taps(n: int, k: int, stride: int, dilation: int, before: int, after: int, mode: str) -> tuple[int, ...]:
    """Along one axis: how many (output, tap) pairs read each of `n` inputs."""
    # -1 marks a zero of the padding; the other modes repeat inputs, which are then read once more.
    source = torch.arange(n, dtype=torch.float64).view(1, 1, n)
    if mode == "zeros":
        source = F.pad(source, (before, after), value=-1.0)
    elif before or after:
        source = F.pad(source, (before, after), mode=mode)
    reads = [int(place) for place in source.flatten()]
    taps = [0] * n
    for start in range(0, len(reads) - dilation * (k - 1), stride):
        for tap in range(k):
            place = reads[start + tap * dilation]
            if place >= 0:
                taps[place] += 1
    return tuple(taps)


def per_step(calls: Sequence[Call], T: int, B: int, stepwise: bool) -> Tensor:
    """The counts of one batch of B samples by time step, `[3, steps]`.

    Steps is T. It is 1 for a layer that runs before time begins, and where the shapes do not tell the time step.
    """
    counts = [call.counts for call in calls if call.counts is not None]
    if stepwise:  # a call is one step (or a part of it, for a layer that is used several times)
        rows = torch.stack([part.flatten(1).sum(dim=1) for part in counts], dim=1)  # [3, calls]
        return rows.reshape(3, 1 if len(counts) == 1 or len(counts) % T else T, -1).sum(dim=2)
    # Time is the outermost dimension: [T, B, ...], [T*B, ...] or [T*B*N].
    timed = all(part.shape[1:3] == (T, B) or part.shape[1] % (T * B) == 0 for part in counts)
    return torch.stack([part.reshape(3, T if timed else 1, -1).sum(dim=2) for part in counts]).sum(dim=0)
