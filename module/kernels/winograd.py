"""3 x 3 convolution whose gradients are computed by Winograd's algorithm F(4 x 4, 3 x 3), in float32 on a CPU.

A surrogate gradient is dense, so spikes do not make the gradient of the input cheaper, and without sparse convolutions
the gradient of the weight costs as much. Winograd's algorithm (Lavin and Gray, "Fast Algorithms for Convolutional
Neural Networks", 2016) needs a quarter of the multiplications. Its rounding error is up to ten times that of the direct
sum; tests check that it stays below 1e-5 of the largest gradient. The forward pass is not computed in this way, because
there a rounding error can change a spike.

Legend: N images, M output and C input channels of the convolution, H x W feature map.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from module.kernels import cpu as cpu_kernels

# Points of interpolation besides infinity, as in module/kernels/csrc/winograd.cpp.
_POINTS = (0.0, 2 / 3, -2 / 3, 4 / 3, -4 / 3)
# Floats of a chunk's tiles, before and after the products: they should stay in the cache.
_CHUNK = 2**21
# With fewer channels the transforms cost more than the products save; for the weight the direct way is slower.
_FEWEST_CHANNELS = 64
_FEWEST_CHANNELS_FOR_WEIGHT = 32
# For comparisons.
enabled = True


def is_faster(weight: Tensor, dtype: torch.dtype, *, for_weight: bool = False) -> bool:
    """Whether `input_grad` (`for_weight`: `weight_grad`) is the faster way for gradients of `dtype`."""
    return (
        enabled
        and dtype == torch.float32
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= (_FEWEST_CHANNELS_FOR_WEIGHT if for_weight else _FEWEST_CHANNELS)
        and cpu_kernels.why_unusable() is None
    )


@functools.cache
def _kernel_transform() -> Tensor:
    """`[36, 9]`: a 3 x 3 kernel -> its values at the 36 pairs of points."""
    rows = []
    for a in _POINTS:
        norm = 1.0
        for b in _POINTS:
            norm *= a - b if b != a else 1.0
        rows.append([1 / norm, a / norm, a * a / norm])
    one = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    return torch.kron(one, one).float()


@torch.library.custom_op("sdt::winograd_input_grad", mutates_args=(), device_types="cpu")
def input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient `[N, C, H, W]` of the input of `F.conv2d(x, weight, padding=1)` from that of its output.

    Args:
        grad: `[N, M, H, W]`, float32.
        weight: `[M, C, 3, 3]`, float32.

    Returns:
        Channels-last; equal to the direct sum within 1e-5 of the largest value.
    """
    M, C = weight.shape[:2]
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = _empty(grad, C)
    # The gradient is a convolution with the flipped kernels.
    kernels = (_kernel_transform().flip(1) @ weight.reshape(M * C, 9).T).view(36, M, C)
    for first, inputs, products in _chunks(grad, M, C):
        cpu_kernels.winograd_to_tiles(grad, first, inputs)
        torch.bmm(inputs, kernels, out=products)
        cpu_kernels.winograd_from_tiles(products, first, out)
    return out


def _chunks(like: Tensor, M: int, C: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The tiles of `like` `[N, *, H, W]` in parts that fit the cache: the first one's number, and room for the
    transforms of M and of C channels."""
    N, _, H, W = like.shape
    tiles = N * -(-H // 4) * -(-W // 4)
    chunk = min(tiles, max(1, _CHUNK // (36 * (M + C))))
    for first in range(0, tiles, chunk):
        count = min(chunk, tiles - first)
        if first == 0 or count != chunk:
            room = like.new_empty(36, count, M), like.new_empty(36, count, C)
        yield first, *room


def _empty(like: Tensor, channels: int) -> Tensor:
    N, _, H, W = like.shape
    return like.new_empty(N, H, W, channels).permute(0, 3, 1, 2)


@input_grad.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return _empty(grad, weight.shape[1])


@torch.library.custom_op("sdt::winograd_weight_grad", mutates_args=(), device_types="cpu")
def weight_grad(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient `[M, C, 3, 3]` of the weight of `F.conv2d(x, weight, padding=1)` from that of its output.

    Args:
        x: `[N, C, H, W]`, float32.
        grad: `[N, M, H, W]`, float32.

    Returns:
        Equal to the direct sum within 1e-5 of the largest value.
    """
    M, C = grad.shape[1], x.shape[1]
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    sums = x.new_zeros(36, M, C)
    for first, gradients, inputs in _chunks(x, M, C):
        cpu_kernels.winograd_gradient_to_tiles(grad, first, gradients)
        cpu_kernels.winograd_to_tiles(x, first, inputs)
        sums.baddbmm_(gradients.transpose(1, 2), inputs)
    return (sums.view(36, M * C).T @ _kernel_transform()).view(M, C, 3, 3)


@weight_grad.register_fake
def _(x: Tensor, grad: Tensor) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1], 3, 3)


@torch.library.custom_op("sdt::conv3x3", mutates_args=(), device_types="cpu")
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)`, channels-last; its gradients are `input_grad` and `weight_grad`."""
    out = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, padding=1)
    return out.contiguous(memory_format=torch.channels_last)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _empty(x, weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        input_grad(grad, weight) if wants_x else None,
        weight_grad(x, grad) if wants_weight else None,
        grad.sum(dim=(0, 2, 3)) if wants_bias else None,
    )


conv3x3.register_autograd(_backward, setup_context=_setup_context)
