"""Max-pooling 3 x 3 with padding 1 as torch operators: with stride 2 on a CPU and on CUDA; with stride 1, the event
mode's, on CUDA.

torch keeps the input and an 8-byte index per output for the backward pass; here it is one byte per output. The results
are bit-equal, in float32 and float64 the gradients too.

Legend: N images (time steps times batch), C channels, H x W feature map; channels innermost in memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from module.kernels import cpu as cpu_kernels
from module.kernels import triton_device
from module.kernels.lif import same_layout

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
    ctx.set_materialize_grads(False)  # no zeros for it
    ctx.save_for_backward(output[1])


def _backward(ctx, g, g_winner):  # type: ignore[no-untyped-def]
    return max_pool_backward(g, *ctx.saved_tensors, *ctx.size), None


_max_pool.register_autograd(_backward, setup_context=_setup_context)


def max_pool(x: Tensor) -> Tensor:
    """`F.max_pool2d(x, 3, 2, 1)` of `x` `[N, C, H, W]`, channels innermost; see `can_pool`."""
    out, _ = _max_pool(x, x.requires_grad and torch.is_grad_enabled())
    return out


# ---- stride 1, over the last two dimensions of [T, B, C, H, W] -------------------------------------------------------

_NEIGHBOURS = dict(
    kernel_size=(1, 3, 3), stride=1, padding=(0, 1, 1), dilation=1, ceil_mode=False, return_indices=False
)


class _Map(NamedTuple):
    """A tensor's memory as `[images, height, width, channels]`; windows end at multiples of `segment` in the width."""

    height: int
    width: int
    segment: int
    channels: int


def _map_of(x: Tensor) -> _Map | None:
    """None if `x` `[T, B, C, H, W]` has another layout than the two that the attention has: channels innermost, or the
    heads `[T, B, h, N, D/h]` of a tensor with channels innermost."""
    _, _, C, H, W = x.shape
    if x.permute(0, 1, 3, 4, 2).is_contiguous():
        return _Map(H, W, W, C)
    if x.permute(0, 1, 3, 2, 4).is_contiguous():
        return _Map(H, C * W, W, 1)
    return None


def can_pool_neighbours(pool: nn.Module, x: Tensor) -> bool:
    """Whether `max_pool_neighbours` computes `pool(x)`: on CUDA, the event mode's pool, of a layout it knows."""
    return (
        type(pool) is nn.MaxPool3d
        and all(getattr(pool, name) == value for name, value in _NEIGHBOURS.items())
        and triton_device.runs(x)
        and triton_device.usable(x)
        and x.numel() > 0
        and _map_of(x) is not None
    )


@torch.library.custom_op("sdt::max_pool_neighbours", mutates_args=())
def _max_pool_neighbours(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The pooled `x` in its layout, and for each value which of the nine inputs it is (if `keep`)."""
    out, winner = _like(x, keep)
    _kernels(x).max_pool_neighbours(x, out, winner if keep else None, *_known_map(x))
    return out, winner


def _known_map(x: Tensor) -> _Map:
    found = _map_of(x)
    assert found is not None
    return found


def _like(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8) if keep else x.new_empty(0, dtype=torch.uint8)


@_max_pool_neighbours.register_fake
def _(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return _like(x, keep)


@torch.library.custom_op("sdt::max_pool_neighbours_backward", mutates_args=())
def max_pool_neighbours_backward(g: Tensor, winner: Tensor) -> Tensor:
    """The gradient of the input, in the layout of `winner`."""
    gx = torch.empty_like(winner, dtype=g.dtype)
    _kernels(g).max_pool_neighbours_backward(same_layout(g, winner, g.dtype), winner, gx, *_known_map(winner))
    return gx


@max_pool_neighbours_backward.register_fake
def _(g: Tensor, winner: Tensor) -> Tensor:
    return torch.empty_like(winner, dtype=g.dtype)


def _setup_neighbours(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for it
    ctx.save_for_backward(output[1])


def _neighbours_grad(ctx, g, g_winner):  # type: ignore[no-untyped-def]
    return max_pool_neighbours_backward(g, *ctx.saved_tensors), None


_max_pool_neighbours.register_autograd(_neighbours_grad, setup_context=_setup_neighbours)


def max_pool_neighbours(x: Tensor) -> Tensor:
    """`nn.MaxPool3d((1, 3, 3), 1, (0, 1, 1))` of `x` `[T, B, C, H, W]`; see `can_pool_neighbours`."""
    out, _ = _max_pool_neighbours(x, x.requires_grad and torch.is_grad_enabled())
    return out
