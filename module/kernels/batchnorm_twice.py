"""Two BatchNorms in a row, as RepConv ends in V2, fused with what follows them; as torch operators on a CPU.

The second one's statistics follow from the first one's: its input has the mean b and the variance w^2 v / (v + eps) of
what the first one made, so both are one scale and one shift, and only the input of the first is kept.

Legend: T time steps, B batch, C channels, H x W feature map; x the input `[T, B, C, H, W]`, v its variance; w, b of the
first BatchNorm, w', b' of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from module.kernels import batchnorm
from module.kernels import cpu as cpu_kernels
from module.kernels.cpu import state_dtype
from module.kernels.fusion import joined_affine, running_affine, update_running
from module.kernels.lif import empty_spikes, is_dense, same_layout
from module.kernels.neurons import KernelNeuron

Norms = Sequence[nn.Module]


def _scales(
    var: Tensor, weight: Tensor, outer_weight: Tensor, eps: float, outer_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale of both, 1 / deviation of the first and of the second, in float64."""
    inv = torch.rsqrt(var + eps)
    outer_inv = torch.rsqrt((weight.double() * inv).square() * var + outer_eps)
    return weight.double() * inv * outer_weight.double() * outer_inv, inv, outer_inv


def _affine(
    x: Tensor, weight: Tensor, outer_weight: Tensor, outer_bias: Tensor, eps: float, outer_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and biased variance of the batch (float64), and the scale and shift of both BatchNorms."""
    mean, var = cpu_kernels.mean_and_variance(x)
    scale = _scales(var, weight, outer_weight, eps, outer_eps)[0]
    shift = outer_bias.double() - mean * scale
    dtype = state_dtype(x.dtype)
    return mean, var, scale.to(dtype).contiguous(), shift.to(dtype).contiguous()


def _through_both(
    g: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, outer_weight: Tensor, eps: float, outer_eps: float,
    sum_g: Tensor, sum_gx: Tensor, gx: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Fill `gx` from the gradient `g` of the second one's output and its sums; the gradients of w, b, w', b'.

    With s the scale of both, i and i' the inverse deviations, n elements per channel and G = i sum(g (x - mean)):
    gx = s (g - sum(g) / n - (x - mean) i G / n (w^2 + eps') i'^2). That of b is 0: the second one takes b away again.
    """
    n = x.numel() // x.shape[2]
    scale, inv, outer_inv = _scales(var, weight, outer_weight, eps, outer_eps)
    total = inv * sum_gx
    q = -scale * inv * total / n * (weight.double().square() + outer_eps) * outer_inv.square()
    center, p, q, r = (v.to(state_dtype(x.dtype)).contiguous() for v in (mean, scale, q, -scale * sum_g / n))
    cpu_kernels.gradient_apply(g, x, center, p, q, r, gx)
    g_weight = outer_weight.double() * outer_inv * total * outer_eps * outer_inv.square()
    g_outer_weight = weight.double() * outer_inv * total
    dtype = weight.dtype
    return g_weight.to(dtype), torch.zeros_like(weight), g_outer_weight.to(dtype), sum_g.to(dtype)


# ---- and a neuron ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("sdt::bn_bn_lif", mutates_args=(), device_types="cpu")
def bn_bn_lif(
    x: Tensor, weight: Tensor, bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    eps: float, outer_eps: float, decay: float, threshold: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Spikes `[T, B, C, H, W]`, and mean and biased variance of `x` `[C]` (float64)."""
    x = batchnorm.with_channels(x)
    mean, var, scale, shift = _affine(x, weight, outer_weight, outer_bias, eps, outer_eps)
    spikes = empty_spikes(x, len(x))
    cpu_kernels.affine_lif_forward(x, scale, shift, spikes, decay, threshold)
    return spikes, mean, var


@bn_bn_lif.register_fake
def _(x, weight, bias, outer_weight, outer_bias, eps, outer_eps, decay, threshold, alpha):  # type: ignore[no-untyped-def]
    channels = weight.new_empty(weight.shape, dtype=torch.float64)
    return empty_spikes(batchnorm.with_channels(x), len(x)), channels, torch.empty_like(channels)


@torch.library.custom_op("sdt::bn_bn_lif_backward", mutates_args=(), device_types="cpu")
def _bn_bn_lif_backward(
    g: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    eps: float, outer_eps: float, decay: float, threshold: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = batchnorm.with_channels(x)
    g, gx = same_layout(g, x, x.dtype), torch.empty_like(x)
    scale = _scales(var, weight, outer_weight, eps, outer_eps)[0]
    values = (scale, outer_bias.double() - mean * scale, mean)
    of_both, shift, center = (value.to(state_dtype(x.dtype)).contiguous() for value in values)
    settings = (decay, threshold, alpha, False)
    sum_g, sum_gx, _ = cpu_kernels.affine_lif_backward(g, x, of_both, shift, center, gx, *settings)
    return gx, *_through_both(gx, x, mean, var, weight, outer_weight, eps, outer_eps, sum_g, sum_gx, gx)


@_bn_bn_lif_backward.register_fake
def _(g, x, mean, var, weight, outer_weight, outer_bias, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(batchnorm.with_channels(x)), *(torch.empty_like(weight) for _ in range(4))


def _setup_lif(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, outer_weight, outer_bias, *ctx.settings = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, weight, outer_weight, outer_bias)


def _lif_grad(ctx, g, g_mean, g_var):  # type: ignore[no-untyped-def]
    return *_bn_bn_lif_backward(g, *ctx.saved_tensors, *ctx.settings), *(None,) * 5


bn_bn_lif.register_autograd(_lif_grad, setup_context=_setup_lif)


# ---- and a shortcut --------------------------------------------------------------------------------------------------


@torch.library.custom_op("sdt::bn_bn_add", mutates_args=(), device_types="cpu")
def bn_bn_add(
    x: Tensor, weight: Tensor, bias: Tensor, outer_weight: Tensor, outer_bias: Tensor, residual: Tensor | None,
    eps: float, outer_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Both BatchNorms of `x`, plus `residual` if there is one; and mean and biased variance of `x` `[C]` (float64)."""
    x = batchnorm.with_channels(x)
    mean, var, scale, shift = _affine(x, weight, outer_weight, outer_bias, eps, outer_eps)
    out = torch.empty_like(x)
    cpu_kernels.affine(x, scale, shift, None if residual is None else same_layout(residual, x, x.dtype), out)
    return out, mean, var


@bn_bn_add.register_fake
def _(x, weight, bias, outer_weight, outer_bias, residual, eps, outer_eps):  # type: ignore[no-untyped-def]
    channels = weight.new_empty(weight.shape, dtype=torch.float64)
    return torch.empty_like(batchnorm.with_channels(x)), channels, torch.empty_like(channels)


@torch.library.custom_op("sdt::bn_bn_add_backward", mutates_args=(), device_types="cpu")
def _bn_bn_add_backward(
    g: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, outer_weight: Tensor, eps: float, outer_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = batchnorm.with_channels(x)
    g, gx = same_layout(g, x, x.dtype), torch.empty_like(x)
    sums = cpu_kernels.gradient_sums(g, x, mean.to(state_dtype(x.dtype)))
    return gx, *_through_both(g, x, mean, var, weight, outer_weight, eps, outer_eps, *sums, gx)


@_bn_bn_add_backward.register_fake
def _(g, x, mean, var, weight, outer_weight, eps, outer_eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(batchnorm.with_channels(x)), *(torch.empty_like(weight) for _ in range(4))


def _setup_add(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, outer_weight, _, residual, *ctx.settings = inputs
    _, mean, var = output
    ctx.adds = residual is not None
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, weight, outer_weight)


def _add_grad(ctx, g, g_mean, g_var):  # type: ignore[no-untyped-def]
    x, *others = ctx.saved_tensors
    if is_dense(x):
        g = same_layout(g, x, x.dtype)  # here, since the shortcut hands it on
    return *_bn_bn_add_backward(g, x, *others, *ctx.settings), g if ctx.adds else None, None, None


bn_bn_add.register_autograd(_add_grad, setup_context=_setup_add)


# ---- of modules, side by side over the channels ----------------------------------------------------------------------


def norms_norms_neurons(inner: Norms, outer: Norms, neuron: KernelNeuron, x: Tensor) -> Tensor:
    """BatchNorms `inner` side by side over the channels of `x`, then `outer`, then `neuron`, which stands for all."""
    decay = float(neuron.decay(x))
    threshold, alpha = neuron.constants()
    if not outer[0].training:
        both = _running_affine(inner, outer)
        return batchnorm.affine_lif(x, *both, neuron.decay(x), len(x), threshold)
    settings = (decay, threshold, alpha)
    spikes, mean, var = bn_bn_lif(x, *joined_affine(inner), *joined_affine(outer), *_eps(inner, outer), *settings)
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
