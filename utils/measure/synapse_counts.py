"""What is counted of one call of a convolution or linear layer, and to which time step it belongs.

Legend: T time steps, B batch, C channels, N tokens; "leading" dimensions are those before channels or features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.run.distributed import Process

# Values that are looked at in one go: few enough to stay in the processor's cache, or many for a GPU.
_CHUNK_CPU, _CHUNK = 1 << 17, 1 << 26

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class LayerCount:
    """What entered one convolution or linear layer, over all samples. Per-step sizes are of one sample.

    A sum without weights is one too, of type `sum`: each of its elements is one operation.
    """

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
class Counts:
    """Everything a `SynapseRecorder` saw, layers in order of their first call."""

    layers: list[LayerCount]
    sums: list[LayerCount]
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


def count_elements(output: Tensor) -> Tensor:
    """The counts of a `Call` of the elements of `output` `[T, B, ...]`, each of them one operation: `[3, T, B]`."""
    nonzero, ones, _ = count_values(output.detach().flatten(0, 1))
    return torch.stack([nonzero, nonzero, ones]).view(3, *output.shape[:2])


def count_values(rows: Tensor, taps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `rows` `[R, ...]`, how many values are not 0, how many are 1, and how many products those not 0
    take part in: `taps` of their place, summed over channels (`rows` is then `[R, C, *places]`). int64, `[R]`.
    """
    size = max(1, rows[:1].numel())
    step = max(1, (_CHUNK_CPU if rows.device.type == "cpu" else _CHUNK) // size)
    weights = None if taps is None or bool(taps.eq(1).all()) else taps.to(rows.device, non_blocking=True)
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
    """For each place of an input of `size`, how many products per channel it takes part in; flat, float64, CPU."""
    return _taps(size, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)


@functools.cache
def _taps(size: tuple[int, ...], *geometry: object) -> Tensor:
    # How often an input is read is the gradient of the sum of the outputs where all weights are 1.
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
    kernel_size, stride, padding, dilation, mode = geometry
    arguments = dict(stride=stride, padding=padding, dilation=dilation, padding_mode=mode, bias=False)
    conv = nn.utils.skip_init(kind, 1, 1, kernel_size, **arguments, dtype=torch.float64)  # draws no random numbers
    nn.init.ones_(conv.weight)
    with torch.enable_grad():
        x = torch.zeros(1, 1, *size, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(conv(x).sum(), x)[0].flatten()


def per_step(calls: Sequence[Call], T: int, B: int, stepwise: bool) -> Tensor:
    """The counts of one batch of B samples by time step, `[3, steps]`.

    Steps is T. It is 1 for a layer that runs before time begins, and where the shapes do not tell the time step.
    """
    counts = [call.counts for call in calls if call.counts is not None]
    if stepwise and len(counts) % T == 0:  # a call is one step, or a part of one for a layer that is used several times
        rows = torch.stack([part.flatten(1).sum(dim=1) for part in counts], dim=1)  # [3, calls]
        return rows.reshape(3, T, -1).sum(dim=2)
    # Time is the outermost dimension: [T, B, ...], [T*B, ...] or [T*B*N].
    timed = all(part.shape[1:3] == (T, B) or part.shape[1] % (T * B) == 0 for part in counts)
    return torch.stack([part.reshape(3, T if timed else 1, -1).sum(dim=2) for part in counts]).sum(dim=0)


@dataclass
class Total:
    """One module over all batches: counts by time step, sizes over all steps; both over all samples."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(3, 0, dtype=torch.int64))  # [3, steps], as in `Call`
    sizes: tuple[int, ...] = (0, 0, 0)  # macs, inputs, outputs

    @property
    def steps(self) -> int:
        """0: never called. 1: before time begins, or where the shapes did not tell the time step. Else T."""
        return self.counts.shape[1]

    def add(self, calls: Sequence[Call], counts: Tensor | None) -> None:
        """Add one batch: its calls, and their counts by time step `[3, steps]`."""
        sizes = zip(self.sizes, *((call.macs, call.inputs, call.outputs) for call in calls), strict=True)
        self.sizes = tuple(map(sum, sizes))
        if counts is not None:
            steps = counts.shape[1] if self.steps in (0, counts.shape[1]) else 1
            self.counts = _in_steps(counts, steps) + (_in_steps(self.counts, steps) if self.steps else 0)

    def per_sample(self, size: int, runs: int) -> int:
        """A size for one sample and run; a mean where it differs between samples."""
        return round(self.sizes[size] / runs)


def sum_totals(names: Sequence[str], totals: Mapping[str, Total], process: Process) -> dict[str, Total]:
    """Summed over all processes (each must call this). A module that did not run here takes part with zeros."""
    mine = [totals.get(name, Total()) for name in names]
    ran = process.sum(*(count for one in mine for count in (one.steps > 0, one.steps == 1, one.steps)))
    # The processes agree on T, but the shapes may not have told it to all of them.
    steps = [1 if once else int(total // (some or 1)) for some, once, total in zip(*[iter(ran)] * 3, strict=True)]
    flat = [torch.zeros(0, dtype=torch.int64)]
    for one, n in zip(mine, steps, strict=True):
        counts = _in_steps(one.counts.cpu(), n) if one.steps else one.counts.new_zeros(3, n)
        flat += [counts.flatten(), torch.tensor(one.sizes)]
    parts = process.sum_tensor(torch.cat(flat)).split([3 * n + 3 for n in steps])
    summed = (Total(p[:-3].view(3, n), tuple(p[-3:].tolist())) for p, n in zip(parts, steps, strict=True))
    return dict(zip(names, summed, strict=True))


def _in_steps(counts: Tensor, steps: int) -> Tensor:
    return counts if counts.shape[1] == steps else counts.sum(dim=1, keepdim=True)
