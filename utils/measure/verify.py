"""Proof that a network is spike-driven: it is run once more with nothing but additions of selected weights.

Three things are checked on a few samples, in float64:
1. only 0 and 1 enter each Conv and Linear layer after the first;
2. with those layers replaced by "look up the weights of the spikes that arrived and add them" (no product anywhere),
   the logits are the same;
3. the additions that this took are as many as `exact` counts.

BatchNorm and neuron updates are as in the network: BatchNorm folds into the weights, a neuron update is no synaptic
operation. Legend: C channels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.errors import listed
from utils.measure.synapses import SynapseRecorder

# Between two orders of summation in float64; the logits are compared by the largest difference over their size.
TOLERANCE = 1e-9
_SPIKES_AT_ONCE = 1 << 16  # rows of weights gathered at a time: bounds the memory

_DENSE_PRODUCTS = ("convolution", "mm", "bmm", "addmm", "baddbmm", "matmul", "dot", "mv", "linear", "einsum")


@dataclass(frozen=True)
class Verification:
    """What the proof found; it passed if nothing was wrong."""

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
        binary = "only 0 and 1 enter every layer after the first"
        found = [(not self.not_binary, binary, f"other values than 0 and 1 enter {listed(self.not_binary)}")]
        if self.unsupported:
            found.append((False, "", f"cannot be run by additions alone: {listed(self.unsupported)}"))
        if self.logits_difference is not None:
            text = f"run with additions alone: logits differ by {self.logits_difference:.1e} (relative, float64)"
            found.append((self.logits_difference <= TOLERANCE, text, text))
            text = f"{sum(self.additions.values()):,} additions done, {sum(self.expected.values()):,} counted"
            found.append((not self.miscounted, text, f"{text}; wrong in {listed(self.miscounted)}"))
            text = f"{self.dense_products} dense product in that run: the first layer's"
            wrong = f"{self.dense_products} dense products in that run, where only the first layer may have one"
            found.append((self.dense_products <= 1, text, wrong))
        return [f"ok      {text}" if good else f"FAILED  {failure}" for good, text, failure in found]


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
        unsupported = [
            layer.name for layer in later if layer.name not in modules or not _supported(modules[layer.name])
        ]
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

    def forward(name: str, x: Tensor) -> Tensor:
        module: Any = modules[name]
        y, additions = (_add_linear if isinstance(module, nn.Linear) else _add_conv2d)(module, x)
        done[name] += additions
        return y

    for name, module in modules.items():
        module.forward = functools.partial(forward, name)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _add_linear(module: nn.Linear, x: Tensor) -> tuple[Tensor, int]:
    """`x` `[..., in]` of 0 and 1 -> `[..., out]`, and the number of additions."""
    y = x.new_zeros(x[..., :1].numel(), module.out_features)
    row, feature = x.reshape(len(y), -1).nonzero(as_tuple=True)
    _gather_and_add(y, row, module.weight.t(), feature)  # weights [in, out]: one row per input
    y = y if module.bias is None else y + module.bias
    return y.reshape(*x.shape[:-1], module.out_features), len(row) * module.out_features


def _add_conv2d(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    """`x` `[..., C, H, W]` of 0 and 1 -> `[..., C', H', W']`, and the number of additions."""
    groups, taps = module.groups, module.weight[0].numel()  # taps: weights that one output has
    # [C * kh * kw, C' / groups]: one row of weights for each input channel and place in the kernel
    weights = module.weight.flatten(1).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    outputs, additions = [], 0
    for image in x.reshape(-1, *x.shape[-3:]):
        # What each output sees of the image, zeros of the padding included: [C * kh * kw, places]
        seen = F.unfold(image, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        source, place = seen.nonzero(as_tuple=True)
        y = x.new_zeros(seen.shape[1] * groups, weights.shape[1])
        _gather_and_add(y, place * groups + source // taps, weights, source)
        additions += len(source) * weights.shape[1]
        outputs.append(y.view(seen.shape[1], -1).t())  # [C', places]
    y = torch.stack(outputs)
    if module.bias is not None:
        y = y + module.bias.unsqueeze(1)
    padding, reach = int(module.padding[0]), module.dilation[0] * (module.kernel_size[0] - 1)
    height = (x.shape[-2] + 2 * padding - reach - 1) // module.stride[0] + 1
    return y.reshape(*x.shape[:-3], module.out_channels, height, -1), additions


def _gather_and_add(y: Tensor, targets: Tensor, weights: Tensor, chosen: Tensor) -> None:
    for start in range(0, len(targets), _SPIKES_AT_ONCE):
        part = slice(start, start + _SPIKES_AT_ONCE)
        y.index_add_(0, targets[part], weights[chosen[part]])
