"""Spike-driven self-attention (paper section 3.3, equations 5 to 7) as one torch operator, on a CPU and on CUDA.

Only the spikes, one byte each, and the sums over tokens are kept for the backward pass.

Legend: T time steps, B batch, D channels, H x W feature map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from module.kernels import cpu as cpu_kernels
from module.kernels import triton_device
from module.kernels.cpu import state_dtype
from module.kernels.lif import dense


def tokens_first(x: Tensor) -> Tensor:
    """`x` `[T, B, C, H, W]` with channels innermost in memory, copied only if they are not."""
    moved = dense(x.permute(0, 1, 3, 4, 2).contiguous())  # [T, B, H, W, C]
    return moved.permute(0, 1, 4, 2, 3)


def _triton() -> Any:
    from module.kernels import triton_attention  # triton takes long to import

    return triton_attention


@torch.library.custom_op("sdt::attend", mutates_args=())
def attend(qkv: Tensor, decay: Tensor, threshold: float, alpha: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Masked q `[T, B, D, H, W]` from q, k, v spikes `[T, B, 3 D, H, W]`; the token sums of k * v `[T, B, D]`; and
    (if `keep`) the spikes in bytes, for the backward pass."""
    qkv = tokens_first(qkv)
    y, kv, kept = _outputs(qkv, keep)
    if triton_device.runs(qkv):
        _triton().attend(qkv, kv, y, kept if keep else None, decay, threshold)
    else:
        cpu_kernels.attend(qkv, kv, y, float(decay), threshold)
        kept.copy_(qkv[: len(kept)])
    return y, kv, kept


def _outputs(qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what `attend` returns. A CPU keeps a byte for each spike, CUDA one for q, k and v together."""
    T, B, channels, H, W = qkv.shape
    y = qkv.new_empty(T, B, H, W, channels // 3).permute(0, 1, 4, 2, 3)
    kv = qkv.new_empty(T, B, channels // 3, dtype=state_dtype(qkv.dtype))
    bytes_each = channels // 3 if triton_device.runs(qkv) else channels
    kept = qkv.new_empty(T if keep else 0, B, H, W, bytes_each, dtype=torch.uint8)
    return y, kv, kept.permute(0, 1, 4, 2, 3)


@attend.register_fake
def _(qkv: Tensor, decay: Tensor, threshold: float, alpha: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(qkv, keep)


@torch.library.custom_op("sdt::attend_backward", mutates_args=())
def attend_backward(
    g: Tensor, kept: Tensor, kv: Tensor, decay: Tensor, threshold: float, alpha: float, want_decay: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the q, k, v spikes and, if wanted, of the decay."""
    g = tokens_first(g)
    gqkv = _input_grad(g)
    if triton_device.runs(g):
        return gqkv, _triton().attend_backward(g, kept, kv, gqkv, decay, threshold, alpha, want_decay)
    g_decay = cpu_kernels.attend_backward(g, kept.to(g.dtype), kv, gqkv, float(decay), threshold, alpha)
    return gqkv, torch.full_like(decay, g_decay)


def _input_grad(g: Tensor) -> Tensor:
    T, B, D, H, W = g.shape
    return g.new_empty(T, B, H, W, 3 * D).permute(0, 1, 4, 2, 3)


@attend_backward.register_fake
def _(g: Tensor, kept: Tensor, kv: Tensor, decay: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _input_grad(g), torch.empty_like(decay)


def _setup_attend(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, decay, ctx.threshold, ctx.alpha, _ = inputs
    _, kv, kept = output
    ctx.mark_non_differentiable(kv, kept)
    ctx.set_materialize_grads(False)  # no zeros for the two
    ctx.save_for_backward(kept, kv, decay)


def _attend_grad(ctx, g, g_kv, g_kept):  # type: ignore[no-untyped-def]
    wants = ctx.needs_input_grad[1]
    gqkv, gd = attend_backward(g, *ctx.saved_tensors, ctx.threshold, ctx.alpha, wants)
    return gqkv, gd if wants else None, None, None, None


attend.register_autograd(_attend_grad, setup_context=_setup_attend)
