"""The two products of V2's attention, q (k^T v), as one torch operator on a CPU that keeps the spikes as bits.

Legend: T time steps, B batch, C channels, H x W feature map, N = H*W tokens, h heads, d = C/h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from module.kernels import cpu as cpu_kernels
from module.kernels.attention import tokens_first
from module.kernels.spike_conv import in_autocast


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[T, B, 3 C, H, W]` with channels innermost -> q, k, v `[T*B, h, N, d]`."""
    T, B, channels, H, W = qkv.shape
    parts = qkv.permute(0, 1, 3, 4, 2).reshape(T * B, H * W, 3, heads, channels // (3 * heads))
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _empty(like: Tensor, channels: int) -> Tensor:
    T, B, _, H, W = like.shape
    return like.new_empty(T, B, H, W, channels).permute(0, 1, 4, 2, 3)


@torch.library.custom_op("sdt::head_products", mutates_args=(), device_types="cpu")
def _head_products(qkv: Tensor, heads: int, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    qkv = tokens_first(qkv)
    T, B, channels, H, W = qkv.shape
    q, k, v = _split(qkv, heads)
    sums = (q @ (k.transpose(2, 3) @ v)) * scale  # [T*B, h, N, d]
    out = sums.transpose(1, 2).reshape(T, B, H, W, channels // 3).permute(0, 1, 4, 2, 3)
    return out, cpu_kernels.pack_bits(qkv) if keep else qkv.new_empty(0, dtype=torch.uint8)


@_head_products.register_fake
def _(qkv: Tensor, heads: int, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    count = (qkv.numel() + 7) // 8 if keep else 0
    return _empty(qkv, qkv.shape[2] // 3), qkv.new_empty(count, dtype=torch.uint8)


@torch.library.custom_op("sdt::head_products_backward", mutates_args=(), device_types="cpu")
def _head_products_backward(g: Tensor, bits: Tensor, heads: int, scale: float) -> Tensor:
    T, B, C, H, W = g.shape
    spikes = _empty(g, 3 * C)
    cpu_kernels.unpack_bits(bits, spikes)
    q, k, v = _split(spikes, heads)
    g = tokens_first(g).permute(0, 1, 3, 4, 2).reshape(T * B, H * W, heads, C // heads).transpose(1, 2) * scale
    kv, g_kv = k.transpose(2, 3) @ v, q.transpose(2, 3) @ g
    gradients = torch.stack([g @ kv.transpose(2, 3), v @ g_kv.transpose(2, 3), k @ g_kv])  # [3, T*B, h, N, d]
    return gradients.permute(1, 3, 0, 2, 4).reshape(T, B, H, W, 3 * C).permute(0, 1, 4, 2, 3)


@_head_products_backward.register_fake
def _(g: Tensor, bits: Tensor, heads: int, scale: float) -> Tensor:
    return _empty(g, 3 * g.shape[2])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.heads, ctx.scale, _ = inputs
    _, bits = output
    ctx.mark_non_differentiable(bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(bits)


def _backward(ctx, g, g_bits):  # type: ignore[no-untyped-def]
    (bits,) = ctx.saved_tensors
    return _head_products_backward(g, bits, ctx.heads, ctx.scale), None, None, None


_head_products.register_autograd(_backward, setup_context=_setup_context)


def head_products(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """q (k^T v) times `scale`, `[T, B, C, H, W]`, of spikes q, k, v `[T, B, 3 C, H, W]`; channel = head * d + index.

    Sums of 0 and 1 are exact in float32, in bfloat16 up to 256.
    """
    out: Tensor = _head_products(in_autocast(qkv), heads, scale, torch.is_grad_enabled())[0]
    return out
