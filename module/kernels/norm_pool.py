"""BatchNorm, neuron and max-pool as one torch operator for CUDA: the spikes before the pool are never written.

Legend: T time steps, B batch, C channels, H x W feature map, h x w pooled; a first dimension of 1 stands for an input
that is the same at each of `steps` steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from module.kernels.batchnorm import batch_affine, with_channels
from module.kernels.cpu import state_dtype
from module.kernels.pool import pooled_size

MOST_STEPS = 8  # beyond that the backward pass would need more registers than there are


def _kernels() -> Any:
    from module.kernels import triton_norm_lif  # triton takes long to import

    return triton_norm_lif


def _outputs(x: Tensor, steps: int, keep: bool) -> tuple[Tensor, Tensor]:
    _, B, C, H, W = x.shape
    h, w = pooled_size(H, W)
    out = x.new_empty(steps, B, h, w, C).permute(0, 1, 4, 2, 3)
    return out, x.new_empty((steps, B, h, w, C) if keep else (0,), dtype=torch.uint8)


@torch.library.custom_op("sdt::affine_lif_pool", mutates_args=())
def affine_lif_pool(x: Tensor, scale: Tensor, shift: Tensor, decay: Tensor, steps: int, threshold: float) -> Tensor:
    """Max-pooled spikes `[steps, B, C, h, w]` of a neuron fed with `x * scale + shift`; no gradient."""
    x = with_channels(x)
    out, _ = _outputs(x, steps, False)
    kind = state_dtype(x.dtype)
    _kernels().affine_lif_pool(x, scale.to(kind), shift.to(kind), out, None, decay, threshold)
    return out


@affine_lif_pool.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, decay: Tensor, steps: int, threshold: float) -> Tensor:
    return _outputs(x, steps, False)[0]


@torch.library.custom_op("sdt::bn_lif_pool", mutates_args=())
def bn_lif_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    decay: Tensor,
    steps: int,
    eps: float,
    threshold: float,
    alpha: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Max-pooled spikes `[steps, B, C, h, w]`; the batch's mean and biased variance `[C]` (float64); and (if `keep`)
    which of the nine inputs each value is, one byte each."""
    x = with_channels(x)
    mean, var, scale, shift = batch_affine(x, weight, bias, eps)
    out, winner = _outputs(x, steps, keep)
    _kernels().affine_lif_pool(x, scale, shift, out, winner if keep else None, decay, threshold)
    return out, mean, var, winner


@bn_lif_pool.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, steps: int, eps: float, th: float, alpha: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, winner = _outputs(x, steps, keep)
    mean, var = (weight.new_empty(weight.shape, dtype=torch.float64) for _ in range(2))
    return out, mean, var, winner


@torch.library.custom_op("sdt::bn_lif_pool_backward", mutates_args=())
def bn_lif_pool_backward(
    g: Tensor,
    winner: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    decay: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    threshold: float,
    alpha: float,
    want_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the input, of BatchNorm's weight and bias, and of the decay."""
    from module.kernels import triton_norm

    x, g = with_channels(x), with_channels(g)
    affine = triton_norm.affine_of(x, mean, var, weight, bias, eps)
    tensors = (g, winner, x, affine, weight, mean, var, decay)
    gx, gw, gb, gd = _kernels().bn_lif_backward(*tensors, eps, threshold, alpha, want_decay)
    return gx, gw, gb, gd


@bn_lif_pool_backward.register_fake
def _(
    g: Tensor, winner: Tensor, x: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(with_channels(x)),
        torch.empty_like(weight),
        torch.empty_like(bias),
        torch.empty_like(decay),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, decay, _, ctx.eps, ctx.threshold, ctx.alpha, _ = inputs
    _, mean, var, winner = output
    ctx.mark_non_differentiable(mean, var, winner)
    ctx.set_materialize_grads(False)  # no zeros for the three
    ctx.save_for_backward(winner, x, weight, bias, decay, mean, var)


def _backward(ctx, g, *_):  # type: ignore[no-untyped-def]
    wants = ctx.needs_input_grad
    grads = bn_lif_pool_backward(g, *ctx.saved_tensors, ctx.eps, ctx.threshold, ctx.alpha, wants[3])
    return *grads[:3], grads[3] if wants[3] else None, None, None, None, None, None


bn_lif_pool.register_autograd(_backward, setup_context=_setup_context)
