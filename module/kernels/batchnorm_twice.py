"""Two BatchNorms in a row, as RepConv ends in V2, fused with what follows them; as torch operators.

Both are one BatchNorm: the second one's input has mean b and variance w^2 v / (v + eps), and so, with the batch's
statistics, the two equal a BatchNorm of the input with weight W = w w' / sqrt(w^2 + eps'), bias b', and
eps eps' / (w^2 + eps') in place of eps. Only the input of the first one is kept.

Legend: T time steps, B batch, C channels, H x W feature map; x the input `[T, B, C, H, W]`, v its variance; w, b, eps
of the first BatchNorm, w', b', eps' of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from module.kernels import batchnorm
from module.kernels.fusion import joined_affine, running_affine, update_running
from module.kernels.lif import empty_spikes, is_dense, same_layout
from module.kernels.neurons import KernelNeuron

Norms = Sequence[nn.Module]


def _as_one(
    var: Tensor, weight: Tensor, outer_weight: Tensor, eps: float, outer_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """1 / sqrt(w^2 + eps'), W in the dtype of w, and the variance plus what stands in place of eps, `[C]` (float64)."""
    w = weight.double()
    inv = torch.rsqrt(w * w + outer_eps)
    return inv, (w * outer_weight * inv).to(weight.dtype), torch.addcmul(var, inv, inv, value=eps * outer_eps)


def _weight_gradients(
    g: Tensor, inv: Tensor, var: Tensor, floored: Tensor, weight: Tensor, outer_weight: Tensor, eps: float,
    outer_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of w, b and w' from the gradient `g` of W; that of b is 0, since the second one takes b away again."""
    g_inv = g * inv
    g_weight = g_inv * outer_weight * (inv * inv) * (outer_eps * (var + eps) / floored)
    return g_weight.to(weight.dtype), torch.zeros_like(weight), (g_inv * weight).to(weight.dtype)


def _normalising(
    x: Tensor, weight: Tensor, outer_weight: Tensor, outer_bias: Tensor, eps: float, outer_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and biased variance of the batch (float64), and the scale and shift of both BatchNorms."""
    mean, var = batchnorm.batch_affine(x, weight, outer_bias, eps)[:2]
    _, of_both, floored = _as_one(var, weight, outer_weight, eps, outer_eps)
    return mean, var, *batchnorm.normalising(x, mean, floored, of_both, outer_bias, 0.0)


# ---- and a neuron ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("sdt::bn_bn_lif", mutates_args=())
def bn_bn_lif(
    x: Tensor, weight: Tensor, bias: Tensor, outer_weight: Tensor, outer_bias: Tensor, decay: Tensor,
    eps: float, outer_eps: float, threshold: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Spikes `[T, B, C, H, W]`, and mean and biased variance of `x` `[C]` (float64)."""
    x = batchnorm.with_channels(x)
    mean, var, scale, shift = _normalising(x, weight, outer_weight, outer_bias, eps, outer_eps)
    return batchnorm.affine_lif(x, scale, shift, decay, len(x), threshold), mean, var


@bn_bn_lif.register_fake
def _(x, weight, bias, outer_weight, outer_bias, decay, eps, outer_eps, threshold, alpha):  # type: ignore[no-untyped-def]
    channels = weight.new_empty(weight.shape, dtype=torch.float64)
    return empty_spikes(batchnorm.with_channels(x), len(x)), channels, torch.empty_like(channels)


def _setup_lif(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, outer_weight, outer_bias, decay, *ctx.eps, ctx.threshold, ctx.alpha = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, weight, outer_weight, outer_bias, decay)


def _lif_grad(ctx, g, g_mean, g_var):  # type: ignore[no-untyped-def]
    x, mean, var, weight, outer_weight, outer_bias, decay = ctx.saved_tensors
    inv, of_both, floored = _as_one(var, weight, outer_weight, *ctx.eps)
    wants = ctx.needs_input_grad[5]
    settings = (0.0, ctx.threshold, ctx.alpha, wants)
    gx, g_both, g_bias, g_decay = batchnorm.bn_lif_backward(g, x, of_both, outer_bias, decay, mean, floored, *settings)
    gradients = _weight_gradients(g_both, inv, var, floored, weight, outer_weight, *ctx.eps)
    return gx, *gradients, g_bias, g_decay if wants else None, *(None,) * 4


bn_bn_lif.register_autograd(_lif_grad, setup_context=_setup_lif)


# ---- and a shortcut --------------------------------------------------------------------------------------------------


@torch.library.custom_op("sdt::bn_bn_add", mutates_args=())
def bn_bn_add(
    x: Tensor, weight: Tensor, bias: Tensor, outer_weight: Tensor, outer_bias: Tensor, residual: Tensor | None,
    eps: float, outer_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Both BatchNorms of `x`, plus `residual` if there is one; and mean and biased variance of `x` `[C]` (float64)."""
    x = batchnorm.with_channels(x)
    mean, var, scale, shift = _normalising(x, weight, outer_weight, outer_bias, eps, outer_eps)
    return batchnorm.affine_add(x, scale, shift, residual), mean, var


@bn_bn_add.register_fake
def _(x, weight, bias, outer_weight, outer_bias, residual, eps, outer_eps):  # type: ignore[no-untyped-def]
    channels = weight.new_empty(weight.shape, dtype=torch.float64)
    return torch.empty_like(batchnorm.with_channels(x)), channels, torch.empty_like(channels)


def _setup_add(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, outer_weight, outer_bias, residual, *ctx.eps = inputs
    _, mean, var = output
    ctx.adds = residual is not None
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, weight, outer_weight, outer_bias)


def _add_grad(ctx, g, g_mean, g_var):  # type: ignore[no-untyped-def]
    x, mean, var, weight, outer_weight, outer_bias = ctx.saved_tensors
    if is_dense(x):
        g = same_layout(g, x, x.dtype)  # here, since the shortcut hands it on
    inv, of_both, floored = _as_one(var, weight, outer_weight, *ctx.eps)
    gx, g_both, g_bias = batchnorm.bn_add_backward(g, x, of_both, outer_bias, mean, floored, 0.0)
    gradients = _weight_gradients(g_both, inv, var, floored, weight, outer_weight, *ctx.eps)
    return gx, *gradients, g_bias, g if ctx.adds else None, None, None


bn_bn_add.register_autograd(_add_grad, setup_context=_setup_add)


# ---- of modules, side by side over the channels ----------------------------------------------------------------------


def norms_norms_neurons(inner: Norms, outer: Norms, neuron: KernelNeuron, x: Tensor) -> Tensor:
    """BatchNorms `inner` side by side over the channels of `x`, then `outer`, then `neuron`, which stands for all."""
    decay, (threshold, alpha) = neuron.decay(x), neuron.constants()
    if not outer[0].training:
        return batchnorm.affine_lif(x, *_running_affine(inner, outer), decay, len(x), threshold)
    affine = (*joined_affine(inner), *joined_affine(outer))
    spikes, mean, var = bn_bn_lif(x, *affine, decay, *_eps(inner, outer), threshold, alpha)
    _update_running(inner, outer, x, mean, var)
    return spikes


def norms_norms_add(inner: Norms, outer: Norms, x: Tensor, residual: Tensor | None) -> Tensor:
    """BatchNorms `inner` side by side over the channels of `x`, then `outer`, plus `residual` if there is one."""
    added = residual if residual is None or residual.dtype == x.dtype else None
    if not outer[0].training:
        out = batchnorm.affine_add(x, *_running_affine(inner, outer), added)
    else:
        affine = (*joined_affine(inner), *joined_affine(outer))
        out, mean, var = bn_bn_add(x, *affine, added, *_eps(inner, outer))
        _update_running(inner, outer, x, mean, var)
    return out if added is residual or residual is None else out + residual


def _eps(inner: Sequence[Any], outer: Sequence[Any]) -> tuple[float, float]:
    return inner[0].eps, outer[0].eps


def _running_affine(inner: Norms, outer: Norms) -> tuple[Tensor, Tensor]:
    (scale, shift), (outer_scale, outer_shift) = (
        (torch.cat(values) for values in zip(*map(running_affine, norms), strict=True)) for norms in (inner, outer)
    )
    return scale * outer_scale, shift * outer_scale + outer_shift


def _update_running(inner: Norms, outer: Norms, x: Tensor, mean: Tensor, var: Tensor) -> None:
    count = x.numel() // x.shape[2]
    update_running(inner, mean, var, count)
    weight, bias = joined_affine(inner)
    eps, _ = _eps(inner, outer)
    update_running(outer, bias.detach().double(), weight.detach().double().square() * var / (var + eps), count)
