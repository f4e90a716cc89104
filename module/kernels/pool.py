"""Max-pooling 3 x 3 with stride 2 and padding 1 as a torch operator, on a CPU and on CUDA.

torch keeps the input and an 8-byte index per output for the backward pass; here it is one byte per output. The results
are bit-equal, in float32 and float64 the gradients too.

Legend: N images (time steps times batch), C channels, H x W feature map; channels innermost in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from module.kernels import cpu as cpu_kernels
from module.kernels import triton_device

_GEOMETRY = dict(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, return_indices=False)


def can_pool(pool: nn.Module, x: Tensor) -> bool:
    """Whether `max_pool` computes `pool(x)`: the module's geometry, and the kind, dtype and layout of `x`."""
    return (
        type(pool) is nn.MaxPool2d
        and all(getattr(pool, name) == value for name, value in _GEOMETRY.items())
        and triton_device.usable(x)
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _kernels(x: Tensor) -> Any:
    if not triton_device.runs(x):
        return cpu_kernels
    from module.kernels import triton_pool  # triton takes long to import

    return triton_pool


def pooled_size(H: int, W: int) -> tuple[int, int]:
    return (H + 1) // 2, (W + 1) // 2


@torch.library.custom_op("sdt::max_pool", mutates_args=())
def _max_pool(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The pooled `x`, and for each value which of the nine inputs it is (if `keep`), channels innermost."""
    out, winner = _outputs(x, keep)
    _kernels(x).max_pool(x, out, winner if keep else None)
    return out, winner


def _outputs(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    N, C, H, W = x.shape
    h, w = pooled_size(H, W)
    out = x.new_empty(N, h, w, C).permute(0, 3, 1, 2)
    return out, x.new_empty((N, h, w, C) if keep else (0,), dtype=torch.uint8)


@_max_pool.register_fake
def _(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return _outputs(x, keep)


@torch.library.custom_op("sdt::max_pool_backward", mutates_args=())
def max_pool_backward(g: Tensor, winner: Tensor, H: int, W: int) -> Tensor:
    """The gradient of the input `[N, C, H, W]` from that of the output."""
    gx = _input_grad(g, H, W)
    _kernels(g).max_pool_backward(g.contiguous(memory_format=torch.channels_last), winner, gx)
    return gx


def _input_grad(g: Tensor, H: int, W: int) -> Tensor:
    return g.new_empty(g.shape[0], H, W, g.shape[1]).permute(0, 3, 1, 2)


@max_pool_backward.register_fake
def _(g: Tensor, winner: Tensor, H: int, W: int) -> Tensor:
    return _input_grad(g, H, W)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.size = inputs[0].shape[2:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, g, g_winner):  # type: ignore[no-untyped-def]
    return max_pool_backward(g, *ctx.saved_tensors, *ctx.size), None


_max_pool.register_autograd(_backward, setup_context=_setup_context)


def max_pool(x: Tensor) -> Tensor:
    """`F.max_pool2d(x, 3, 2, 1)` of `x` `[N, C, H, W]`, channels innermost; see `can_pool`."""
    out, _ = _max_pool(x, x.requires_grad and torch.is_grad_enabled())
    return out
