"""Sparse convolutions inside an ordinary model, for training and evaluation on a CPU.

`SparseConv2d` is the substitute of `nn.Conv2d`: same parameters, same state-dict keys, same place for hooks. What
follows it (BatchNorm, neurons) stays as it is. `module.sparse.inference` goes further, for evaluation only.

Legend: C input and M output channels, H x W feature map.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module.kernels.cpu import same_size_kernel
from module.kernels.native import NativeError
from module.kernels.substitute import Context, Substitute, autocast_dtype
from module.sparse.library import load
from module.sparse.ops import KERNELS, OUTPUT_DTYPES, SPIKE_DTYPES, sparse_conv2d

ENGINES = ("auto", "dense", "sparse")


class _SparseConv(Substitute):
    """A convolution that adds the weight rows of its active inputs.

    In float64, and for values other than 0 and 1, it is the plain convolution.

    Attributes:
        auto: dense above the firing rate where that is faster here; otherwise sparse at any rate.
        bf16_input_grad: compute the gradient of the input in bfloat16, all else in float32.
        counts: int64 `[spikes, additions]` of the last forward pass outside `torch.compile`; see `sparse_conv2d`.
    """

    runs_as = "sparse additions"
    stands_for: ClassVar[dict[str, str]] = {}
    auto: bool = True
    bf16_input_grad: bool = False
    counts: Tensor | None = None

    @property
    def gradient_tolerance(self) -> float:  # type: ignore[override]
        """Winograd's algorithm, as in `module.kernels.parts.FusedSPS`; a rounding of bfloat16 where it is asked for."""
        return 2.0**-6 if self.bf16_input_grad else 1e-5

    @classmethod
    def seen(cls, context: Context) -> Context:
        return (*context[:3], True)

    def may_run(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and x.dtype in SPIKE_DTYPES and super().may_run(x)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """This layer's way of computing `x` `[N, C, H, W]` with other parameters, as those of several layers joined."""
        out_dtype = autocast_dtype("cpu") or (x.dtype if x.is_floating_point() else torch.float32)
        if x.dtype not in SPIKE_DTYPES or out_dtype not in OUTPUT_DTYPES:
            return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        out, counts = sparse_conv2d(
            x, weight, bias, out_dtype=out_dtype, auto=self.auto, bf16_input_grad=self.bf16_input_grad
        )
        if not torch.compiler.is_compiling():
            self.counts = counts
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, auto={self.auto}, bf16_input_grad={self.bf16_input_grad}"


class SparseConv2d(_SparseConv, nn.Conv2d):
    """A 1x1 or 3x3 convolution."""

    plain_class: ClassVar[type[nn.Module]] = nn.Conv2d

    def fast_forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)


class SparseConv1d(_SparseConv, nn.Conv1d):
    """A convolution of one token, `[N, C, L]`."""

    plain_class: ClassVar[type[nn.Module]] = nn.Conv1d

    def fast_forward(self, x: Tensor) -> Tensor:
        return self.convolve(x.unsqueeze(3), self.weight.unsqueeze(3), self.bias).squeeze(3)


def check_engine(engine: str) -> str:
    """The engine's name; `event` is the old name of `sparse`. Raises ValueError for an unknown one."""
    if engine not in (*ENGINES, "event"):
        raise ValueError(f"engine={engine!r} is not one of {', '.join(ENGINES)}")
    return "sparse" if engine == "event" else engine


def why_unusable() -> str | None:
    """None, or the reason why the kernels cannot be built here."""
    try:
        load()
    except NativeError as error:
        return str(error)
    return None


def substitute_for(layer: nn.Module) -> type[Substitute] | None:
    """The class that computes this convolution by additions, or None."""
    if type(layer) is nn.Conv2d and same_size_kernel(layer) in KERNELS:
        return SparseConv2d
    if type(layer) is nn.Conv1d and (layer.kernel_size, layer.stride, layer.groups) == ((1,), (1,), 1):
        return SparseConv1d if layer.padding == (0,) else None
    return None
