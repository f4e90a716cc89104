"""Proof that a network is spike-driven: it is run once more with nothing but additions of selected weights.

Three things are checked on a few samples, in float64:
1. only 0 and 1 enter each Conv and Linear layer after the first;
2. with those layers replaced by "look up the weights of the spikes that arrived and add them" (no product anywhere),
   the logits are the same;
3. the additions that this took are as many as `exact` counts.

BatchNorm and neuron updates are as in the network: the first folds into the weights, the second is no synapse.
Legend: L leading size (time and batch), C channels.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.errors import listed
from utils.measure.synapse_counts import COUNTED
from utils.measure.synapses import SynapseRecorder

# Between two orders of summation in float64; the logits are compared by the largest difference over their size.
TOLERANCE = 1e-9
_SPIKES_AT_ONCE = 1 << 16  # rows of weights gathered at a time: bounds the memory

_DENSE_PRODUCTS = ("convolution", "mm", "bmm", "addmm", "baddbmm", "matmul", "dot", "mv", "linear", "einsum")


@dataclass(frozen=True)
class Verification:
    """What the proof found; `passed` is the whole of it."""

    samples: int
    not_binary: list[str]  # layers after the first that take other values than 0 and 1
    unsupported: list[str]  # layers that cannot be run by additions
    logits_difference: float | None  # relative; None if the second run was not possible
    additions: dict[str, int] = field(default_factory=dict)  # done, by layer
    expected: dict[str, int] = field(default_factory=dict)  # counted by `exact`
    dense_products: int = 0  # convolutions and matrix products of the whole second run; the first layer is one

    @property
    def miscounted(self) -> list[str]:
        return [name for name, count in self.additions.items() if self.expected[name] != count]

    @property
    def passed(self) -> bool:
        difference = self.logits_difference
        close = difference is not None and difference <= TOLERANCE
        return close and not (self.not_binary or self.unsupported or self.miscounted) and self.dense_products <= 1

    def lines(self) -> list[str]:
        """The findings, one per line."""
        found = [
            _verdict(
                not self.not_binary,
                "only 0 and 1 enter every layer after the first",
                f"other values than 0 and 1 enter {listed(self.not_binary)}",
            )
        ]
        if self.unsupported:
            found.append(_verdict(False, "", f"cannot be run by additions alone: {listed(self.unsupported)}"))
        if self.logits_difference is not None:
            text = f"run with additions alone: logits differ by {self.logits_difference:.1e} (relative, float64)"
            found.append(_verdict(self.logits_difference <= TOLERANCE, text, text))
            total = sum(self.additions.values())
            counted = sum(self.expected.values())
            text = f"{total:,} additions done, {counted:,} counted"
            found.append(_verdict(not self.miscounted, text, f"{text}; wrong in {listed(self.miscounted)}"))
            text = f"{self.dense_products} dense product in that run: the first layer's"
            wrong = f"{self.dense_products} dense products in that run, where only the first layer may have one"
            found.append(_verdict(self.dense_products <= 1, text, wrong))
        return found


def verify_spike_driven(model: nn.Module, batch: Tensor) -> Verification:
    """Run the proof on one batch. Slow: spikes are handled one by one. `model` is left as it is.

    The model is called as `model(x)` and returns logits or a tuple that begins with them.
    """
    model = copy.deepcopy(model).double().eval()
    x = batch.double()
    with torch.no_grad():
        with SynapseRecorder(model) as recorder:
            logits = _logits(model(x))
        counts = recorder.counts()
        later = counts.layers[1:]
        not_binary = [layer.name for layer in later if not layer.is_binary]
        modules = dict(model.named_modules())
        unsupported = [layer.name for layer in later if not _supported(modules[layer.name])]
        if not_binary or unsupported:
            return Verification(counts.samples, not_binary, unsupported, None)
        done = {layer.name: 0 for layer in later}
        with _by_additions({name: modules[name] for name in done}, done), _DenseProducts() as products:
            again = _logits(model(x))
    scale = float(logits.abs().max()) or 1.0
    return Verification(
        samples=counts.samples,
        not_binary=[],
        unsupported=[],
        logits_difference=float((again - logits).abs().max()) / scale,
        additions=done,
        expected={layer.name: sum(layer.synops or []) for layer in later},
        dense_products=products.count,
    )


def _logits(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _supported(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class _DenseProducts(TorchDispatchMode):
    """Counts the operators inside which numbers are multiplied with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in _DENSE_PRODUCTS
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _by_additions(modules: dict[str, nn.Module], done: dict[str, int]) -> Iterator[None]:
    """Let each module compute by additions; `done` counts them."""

    def replacement(name: str, module: nn.Module) -> Any:
        def forward(x: Tensor) -> Tensor:
            assert isinstance(module, COUNTED)
            add = _add_linear if isinstance(module, nn.Linear) else _add_conv2d
            y, additions = add(module, x)  # type: ignore[arg-type]
            done[name] += additions
            return y

        return forward

    for name, module in modules.items():
        module.forward = replacement(name, module)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _add_linear(module: nn.Linear, x: Tensor) -> tuple[Tensor, int]:
    """`x` `[..., in]` of 0 and 1 -> `[..., out]`, and the number of additions."""
    rows = x.reshape(-1, module.in_features)
    y = x.new_zeros(len(rows), module.out_features)
    if module.bias is not None:
        y += module.bias
    weights = module.weight.t()  # [in, out]: one row per input
    row, feature = rows.nonzero(as_tuple=True)
    _gather_and_add(y, row, weights, feature)
    return y.reshape(*x.shape[:-1], module.out_features), len(row) * module.out_features


def _add_conv2d(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    """`x` `[..., C, H, W]` of 0 and 1 -> `[..., C', H', W']`, and the number of additions.

    Every spike is sent to the outputs that one kernel tap after the other connects it with.
    """
    *leading, C, H, W = x.shape
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    ph, pw = int(module.padding[0]), int(module.padding[1])
    out_h = (H + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    out_w = (W + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    images = x.reshape(-1, C, H, W)
    group_out, group_in = module.out_channels // module.groups, C // module.groups
    # [L * out_h * out_w * groups, C' / groups]: one row for what a spike reaches through one tap
    y = x.new_zeros(len(images) * out_h * out_w * module.groups, group_out)
    image, channel, row, column = images.nonzero(as_tuple=True)
    additions = 0
    for i in range(kh):
        for j in range(kw):
            up, left = row + ph - i * dh, column + pw - j * dw
            hits = (up >= 0) & (left >= 0) & (up % sh == 0) & (left % sw == 0)
            hits &= (up < out_h * sh) & (left < out_w * sw)
            c = channel[hits]
            place = (image[hits] * out_h + up[hits] // sh) * out_w + left[hits] // sw
            # one row of weights per input channel: those that lead from it through this tap
            weights = module.weight[:, :, i, j].reshape(module.groups, group_out, group_in)
            weights = weights.transpose(1, 2).reshape(C, group_out)
            _gather_and_add(y, place * module.groups + c // group_in, weights, c)
            additions += len(c) * group_out
    y = y.reshape(len(images), out_h, out_w, module.out_channels)
    if module.bias is not None:
        y = y + module.bias
    return y.permute(0, 3, 1, 2).reshape(*leading, module.out_channels, out_h, out_w), additions


def _gather_and_add(y: Tensor, targets: Tensor, weights: Tensor, chosen: Tensor) -> None:
    for start in range(0, len(targets), _SPIKES_AT_ONCE):
        part = slice(start, start + _SPIKES_AT_ONCE)
        y.index_add_(0, targets[part], weights[chosen[part]])


def _verdict(good: bool, text: str, failure: str) -> str:
    return f"ok      {text}" if good else f"FAILED  {failure or text}"
