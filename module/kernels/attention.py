"""Spike-driven self-attention (paper section 3.3, equations 5 to 7) as one torch operator on the compiled CPU kernels.

Only the spikes, one byte each, and the sums over tokens are kept for the backward pass.

Legend: T time steps, B batch, D channels, H x W feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from module.kernels import cpu as cpu_kernels
from module.kernels.lif import dense, state_dtype


def tokens_first(x: Tensor) -> Tensor:
    """`x` `[T, B, C, H, W]` with channels innermost in memory, copied only if they are not."""
    moved = dense(x.permute(0, 1, 3, 4, 2).contiguous())  # [T, B, H, W, C]
    return moved.permute(0, 1, 4, 2, 3)


@torch.library.custom_op("sdt::attend", mutates_args=())
def attend(qkv: Tensor, decay: Tensor, threshold: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Masked q `[T, B, D, H, W]` from q, k, v spikes `[T, B, 3 D, H, W]`; and the token sums of k * v `[T, B, D]`."""
    qkv = tokens_first(qkv)
    T, B, channels = qkv.shape[:3]
    kv = qkv.new_empty(T, B, channels // 3, dtype=state_dtype(qkv.dtype))
    y = _masked(qkv)
    cpu_kernels.attend(qkv, kv, y, float(decay), threshold)
    return y, kv


def _masked(qkv: Tensor) -> Tensor:
    T, B, channels, H, W = qkv.shape
    return qkv.new_empty(T, B, H, W, channels // 3).permute(0, 1, 4, 2, 3)


@attend.register_fake
def _(qkv: Tensor, decay: Tensor, threshold: float, alpha: float) -> tuple[Tensor, Tensor]:
    T, B, channels, _, _ = qkv.shape
    return _masked(qkv), qkv.new_empty(T, B, channels // 3, dtype=state_dtype(qkv.dtype))


@torch.library.custom_op("sdt::attend_backward", mutates_args=())
def attend_backward(
    g: Tensor, qkv: Tensor, kv: Tensor, decay: Tensor, threshold: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the q, k, v spikes and of the decay."""
    qkv = tokens_first(qkv)
    gqkv = torch.empty_like(qkv)
    g = tokens_first(g.to(qkv.dtype))
    g_decay = cpu_kernels.attend_backward(g, qkv, kv, gqkv, float(decay), threshold, alpha)
    return gqkv, torch.full_like(decay, g_decay)


@attend_backward.register_fake
def _(g: Tensor, qkv: Tensor, kv: Tensor, decay: Tensor, threshold: float, alpha: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens_first(qkv)), torch.empty_like(decay)


def _setup_attend(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, decay, ctx.threshold, ctx.alpha = inputs
    _, kv = output
    ctx.mark_non_differentiable(kv)
    ctx.dtype = qkv.dtype
    ctx.save_for_backward(qkv.to(torch.uint8), kv, decay)  # spikes: a byte each is enough


def _attend_grad(ctx, g, g_kv):  # type: ignore[no-untyped-def]
    spikes, kv, decay = ctx.saved_tensors
    gqkv, gd = attend_backward(g, spikes.to(ctx.dtype), kv, decay, ctx.threshold, ctx.alpha)
    return gqkv, gd if ctx.needs_input_grad[1] else None, None, None


attend.register_autograd(_attend_grad, setup_context=_setup_attend)
