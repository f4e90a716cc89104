"""What is counted of one call of a convolution or linear layer, and to which time step it belongs.

Legend: T time steps, B batch, C channels, N tokens; "leading" dimensions are those before channels or features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.measure.geometry import Geometry
from utils.measure.spike_values import ADDITIONS, NONZERO, OPERATIONS, ROWS, Counted, Values, count_values

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class LayerCount:
    """What entered one convolution or linear layer, over all samples. Per-step sizes are of one sample.

    A sum without weights is one too, of type `sum`: each of its elements is one operation.
    """

    name: str
    type: str
    samples: int
    macs_per_step: int  # products of the dense layer, those with padding included
    inputs_per_step: int
    outputs_per_step: int
    weights: int
    nonzero: list[int]  # per step, all samples
    synops: list[int] | None  # additions (of a spike) or products really needed; None if they were not counted
    values: Values = field(default_factory=Values)
    repeated: list[int] | None = None  # as `nonzero`, with a whole number of n taken for n spikes, where that is done

    @property
    def is_binary(self) -> bool:
        """Whether every value that entered was 0 or 1."""
        return self.values.kind == "binary"

    @property
    def spike_rate(self) -> list[float]:
        """As `rate`, with a whole number of n taken for n spikes: what MACs give the operations by, per step."""
        return [count / (self.inputs_per_step * self.samples) for count in self.repeated or self.nonzero]

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
class Counts:
    """Everything a `SynapseRecorder` saw, layers in order of their first call."""

    layers: list[LayerCount]
    sums: list[LayerCount]
    neurons_per_step: dict[str, int]  # updates for one sample, by neuron layer
    norms_per_step: dict[str, int]  # outputs for one sample, by BatchNorm layer, in the order in which they run
    time_steps: int
    samples: int
    order: list[str]  # names of layers and sums in order of computation
    never_called: list[str]  # convolutions and linear layers that the forward pass does not use
    unpriced: list[str]  # operators that multiply and are not counted, with the place where they ran
    # Operations of each layer and sample [len(order), samples], samples in the order of the data set; None where the
    # shapes do not tell the sample, or operations were not counted.
    by_sample: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Call:
    """One call of a module: counts stay on the device, sizes are those of the whole call."""

    counts: Tensor | None  # [ROWS, *leading], see `utils.measure.spike_values`
    macs: int
    inputs: int
    outputs: int
    low: float = math.inf
    high: float = 0.0
    in_order: bool = True  # whether `leading` begins with time and sample


def count_layer(module: nn.Module, x: Tensor, output: Tensor, exact: bool) -> Call:
    """The counts of one call of a layer in `COUNTED`.

    An operation is a pair of a non-zero input and a weight it meets: a spike at the border of a padded 3x3 conv
    meets fewer than nine taps per channel. With `exact` off the operations are left at 0.
    """
    if isinstance(module, nn.Linear):
        return count_rows(x, x.shape[:-1], module.out_features, output.numel(), exact)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return count_conv(x, module.weight, output, Geometry.of(module), exact)


def count_rows(x: Tensor, leading: tuple[int, ...], fan_out: int, outputs: int, exact: bool) -> Call:
    """The counts of a product of `x` `[*leading, ...]` where each value meets `fan_out` weights."""
    rows = x.flatten(0, len(leading) - 1) if leading else x.unsqueeze(0)
    return _call(count_values(rows), leading, fan_out, x.numel() * fan_out, x, outputs, exact)


def count_selected(first: Tensor, second: Tensor, exact: bool, sums: tuple[bool, bool] = (False, False)) -> Call:
    """The counts of `first` `[b, M, K]` times `second` `[b, K, N]`, both computed from the input.

    Spikes of one of the two choose what is added of the other, so that one is taken for the input. Where both are
    spikes of 0 and 1, an operation is a pair of spikes that meet.

    Args:
        sums: which of the two are sums of spikes: all of their values are added, 0 or not.
    """
    outputs = first.shape[0] * first.shape[1] * second.shape[2]
    ranks = [_rank(one, is_sum) for one, is_sum in zip((first, second), sums, strict=True)]
    if ranks[1] < ranks[0]:
        first, second = second.transpose(1, 2), first.transpose(1, 2)
    call = count_rows(first, first.shape[:2], second.shape[2], outputs, exact)
    if exact and not any(sums) and call.counts is not None:
        pairs = torch.bmm(first.ne(0).double(), second.ne(0).sum(dim=2, keepdim=True).double()).squeeze(2)  # [b, M]
        binary = torch.stack([((one == 0) | (one == 1)).flatten(1).all(dim=1) for one in (first, second)]).all(dim=0)
        for row in (OPERATIONS, ADDITIONS):
            call.counts[row] = torch.where(binary.unsqueeze(1), pairs.long(), call.counts[row])
    return call


def _rank(values: Tensor, is_sum: bool) -> int:
    """0 for spikes of 0 and 1, 1 for other whole numbers, 2 for sums, 3 for real values."""
    if not bool((values == values.round()).all()):
        return 3
    return 2 if is_sum else int(not bool(((values == 0) | (values == 1)).all()))


def count_dense(x: Tensor, output: Tensor, macs: int) -> Call:
    """The counts of an operator that hides what it multiplies: all of its products, of real values."""
    counts = torch.zeros(ROWS, 1, dtype=torch.int64, device=x.device)
    counts[NONZERO], counts[OPERATIONS] = x.numel(), macs
    return Call(counts, macs, x.numel(), output.numel(), 0.0, math.inf)


def count_conv(x: Tensor, weight: Tensor, output: Tensor, geometry: Geometry, exact: bool) -> Call:
    """The counts of a convolution of `x` `[*leading, C, *places]` with `weight`."""
    dims = len(geometry.kernel_size)
    # weights of one input channel and place in the kernel: [C', C / groups, ...], transposed [C, C' / groups, ...]
    fan_out = weight.shape[1] if geometry.transposed else weight.shape[0] // geometry.groups
    # a transposed convolution multiplies for each input, another for each output
    macs = (x if geometry.transposed else output).numel() * weight[0].numel()
    leading, places = x.shape[: -1 - dims], tuple(x.shape[-dims:])
    rows = x.flatten(0, len(leading) - 1) if leading else x.unsqueeze(0)
    found = count_values(rows, geometry.place_taps(places) if exact else None)
    return _call(found, leading, fan_out, macs, x, output.numel(), exact)


def _call(
    found: Counted, leading: tuple[int, ...], fan_out: int, macs: int, x: Tensor, outputs: int, exact: bool
) -> Call:
    found.counts[[OPERATIONS, ADDITIONS]] *= fan_out if exact else 0
    counts = found.counts.unflatten(1, leading or (1,))
    return Call(counts, macs, x.numel(), outputs, found.low, found.high)


def count_elements(output: Tensor) -> Call:
    """The counts of the elements of `output` `[T, B, ...]`, each of them one operation."""
    found = count_values(output.detach().flatten(0, 1))
    counts = found.counts.unflatten(1, output.shape[:2])
    return Call(counts, output.numel(), output.numel(), 0, found.low, found.high)
