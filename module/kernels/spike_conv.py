"""Convolution of spikes on a CPU as one torch operator that keeps its input as bits for the backward pass.

The forward pass is torch's. The gradients of wide 3 x 3 convolutions are computed by Winograd's algorithm
(module/kernels/winograd.py), the others by torch.

Legend: N images, C input and M output channels, H x W feature map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from module.kernels import cpu as cpu_kernels
from module.kernels import winograd
from module.kernels.substitute import autocast_dtype, plain_class


def fits(conv: nn.Module) -> bool:
    """Whether the operator computes this convolution."""
    return (
        plain_class(conv) is nn.Conv2d
        and isinstance(conv, nn.Conv2d)
        and (conv.groups, conv.dilation, conv.padding_mode) == (1, (1, 1), "zeros")
        and not isinstance(conv.padding, str)
    )


def in_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast gives the input of a convolution or a product of matrices."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def innermost(x: Tensor) -> Tensor:
    """`x` `[N, C, H, W]` with channels innermost in memory, copied only if they are not."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def rows(x: Tensor) -> Tensor:
    """`x` `[N, C, H, W]` with channels innermost -> `[N*H*W, C]`."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def empty(like: Tensor, N: int, C: int, H: int, W: int) -> Tensor:
    """`[N, C, H, W]` with channels innermost."""
    return like.new_empty(N, H, W, C).permute(0, 3, 1, 2)


def kept(bits: Tensor, like: Tensor, N: int, C: int, H: int, W: int) -> Tensor:
    """The spikes that `cpu.pack_bits` packed with channels innermost, in the dtype of `like`."""
    x = empty(like, N, C, H, W)
    cpu_kernels.unpack_bits(bits, x)
    return x


@torch.library.custom_op("sdt::spike_conv2d", mutates_args=(), device_types="cpu")
def _spike_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, keep: bool
) -> tuple[Tensor, Tensor]:
    x = innermost(x)
    out = innermost(F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding))
    return out, cpu_kernels.pack_bits(x) if keep else x.new_empty(0, dtype=torch.uint8)


@_spike_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, keep: bool) -> tuple[Tensor, Tensor]:
    N, _, H, W = x.shape
    M, _, k, _ = weight.shape
    size = ((side + 2 * padding - k) // stride + 1 for side in (H, W))
    return empty(x, N, M, *size), x.new_empty((x.numel() + 7) // 8 if keep else 0, dtype=torch.uint8)


@torch.library.custom_op("sdt::spike_conv2d_input_grad", mutates_args=(), device_types="cpu")
def input_grad(g: Tensor, weight: Tensor, shape: list[int], stride: int, padding: int) -> Tensor:
    """`[N, C, H, W]` (`shape`), from the gradient `g` of the result."""
    g = innermost(g)
    if (stride, padding) == (1, 1) and winograd.is_faster(weight, g.dtype):
        return winograd.input_grad(g, weight)
    weight = weight.to(g.dtype).contiguous(memory_format=torch.channels_last)
    return innermost(conv2d_input(shape, weight, g, stride, padding))


@input_grad.register_fake
def _(g: Tensor, weight: Tensor, shape: list[int], stride: int, padding: int) -> Tensor:
    return empty(g, *shape)


@torch.library.custom_op("sdt::spike_conv2d_weight_grad", mutates_args=(), device_types="cpu")
def weight_grad(g: Tensor, bits: Tensor, weight: Tensor, shape: list[int], stride: int, padding: int) -> Tensor:
    """From the gradient `g` of the result, and the spikes `[N, C, H, W]` (`shape`) as bits."""
    g = innermost(g)
    x = kept(bits, g, *shape)
    if (stride, padding) == (1, 1) and winograd.is_faster(weight, g.dtype, for_weight=True):
        return winograd.weight_grad(x, g)
    if weight.shape[2:] == (1, 1) and (stride, padding) == (1, 0):
        return (rows(g).T @ rows(x)).to(weight.dtype)[:, :, None, None]
    return conv2d_weight(x, weight.shape, g, stride, padding).to(weight.dtype).contiguous()


@weight_grad.register_fake
def _(g: Tensor, bits: Tensor, weight: Tensor, shape: list[int], stride: int, padding: int) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.stride, ctx.padding, _ = inputs
    _, bits = output
    ctx.shape, ctx.bias_dtype = list(x.shape), None if bias is None else bias.dtype
    ctx.mark_non_differentiable(bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(bits, weight)


def _backward(ctx, g, g_bits):  # type: ignore[no-untyped-def]
    bits, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    settings = (ctx.shape, ctx.stride, ctx.padding)
    # First, so that the spikes are gone when the other gradient, which is as large, is there.
    g_weight = weight_grad(g, bits, weight, *settings) if wants_weight else None
    return (
        input_grad(g, weight, *settings) if wants_x else None,
        g_weight,
        g.sum(dim=(0, 2, 3)).to(ctx.bias_dtype) if wants_bias else None,
        *(None, None, None),
    )


_spike_conv2d.register_autograd(_backward, setup_context=_setup_context)


def spike_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """`F.conv2d(x, weight, bias, stride, padding)` of spikes `[N, C, H, W]`, with channels innermost.

    `x` must hold nothing but 0 and 1: the gradient of the weight is computed from bits.
    """
    keep = torch.is_grad_enabled() and weight.requires_grad
    out: Tensor = _spike_conv2d(in_autocast(x), weight, bias, stride, padding, keep)[0]
    return out
