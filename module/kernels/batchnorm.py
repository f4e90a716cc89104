"""BatchNorm fused with what follows it (a neuron, or a shortcut's addition), as torch operators: on the compiled
kernels of a CPU, and on Triton's for CUDA.

A training forward keeps BatchNorm's input and no other tensor of that size; the normalised values exist only in
registers. Statistics and sums are accumulated in float64.

Legend: T time steps, B batch, C channels, H x W feature map.
Inputs are `[T, B, C, H, W]`; a first dimension of 1 stands for the same input at each of `steps` steps. `decay` is
0-dimensional; on CUDA also `[G]`, one value for each of G equal runs of channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from module.kernels import cpu as cpu_kernels
from module.kernels import triton_device
from module.kernels.cpu import state_dtype
from module.kernels.lif import empty_spikes, is_dense, same_layout


def _triton() -> Any:
    from module.kernels import triton_norm  # triton takes long to import

    return triton_norm


def _triton_lif() -> Any:
    from module.kernels import triton_norm_lif

    return triton_norm_lif


def with_channels(x: Tensor) -> Tensor:
    """`x`, copied unless its layout is dense with channels innermost, or (on a CPU) plainly contiguous."""
    on_cpu = not triton_device.runs(x)
    if is_dense(x) and (x.stride(2) == 1 or x[0, 0, 0].numel() == 1 or (on_cpu and x.is_contiguous())):
        return x
    return x.contiguous() if on_cpu else x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _per_channel(x: Tensor, values: Tensor) -> Tensor:
    """Per-channel values in the dtype the kernels take beside `x`."""
    return values.to(state_dtype(x.dtype)).contiguous()


def affine_of(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel that normalise, in float64."""
    scale = weight.double() * torch.rsqrt(var.double() + eps)
    return scale, bias.double() - mean.double() * scale


# ---- in evaluation: a known scale and shift per channel, no gradient -------------------------------------------------


@torch.library.custom_op("sdt::affine_lif", mutates_args=())
def affine_lif(x: Tensor, scale: Tensor, shift: Tensor, decay: Tensor, steps: int, threshold: float) -> Tensor:
    """Spikes `[steps, B, C, H, W]` of a neuron fed with `x * scale + shift`."""
    x = with_channels(x)
    spikes = empty_spikes(x, steps)
    _affine_lif(x, _per_channel(x, scale), _per_channel(x, shift), spikes, decay, threshold)
    return spikes


def _affine_lif(x: Tensor, scale: Tensor, shift: Tensor, spikes: Tensor, decay: Tensor, threshold: float) -> None:
    if triton_device.runs(x):
        _triton_lif().affine_lif(x, scale, shift, spikes, decay, threshold)
    else:
        cpu_kernels.affine_lif_forward(x, scale, shift, spikes, float(decay), threshold)


def _affine(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor) -> None:
    (_triton().affine_add if triton_device.runs(x) else cpu_kernels.affine)(x, scale, shift, residual, out)


@affine_lif.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, decay: Tensor, steps: int, threshold: float) -> Tensor:
    return empty_spikes(with_channels(x), steps)


def _added(residual: Tensor | None, x: Tensor) -> Tensor | None:
    return None if residual is None else same_layout(residual, x, x.dtype)


@torch.library.custom_op("sdt::affine_add", mutates_args=())
def affine_add(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """`x * scale + shift`, plus `residual` if there is one."""
    x = with_channels(x)
    out = torch.empty_like(x)
    _affine(x, _per_channel(x, scale), _per_channel(x, shift), _added(residual, x), out)
    return out


@affine_add.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    return torch.empty_like(with_channels(x))


def batch_affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and biased variance of the batch per channel (float64), and the scale and shift that normalise by them."""
    if triton_device.runs(x):
        return _triton().batch_affine(x, weight, bias, eps)
    mean, var = cpu_kernels.mean_and_variance(x)
    return mean, var, *normalising(x, mean, var, weight, bias, eps)


def normalising(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The scale and shift of `batch_affine` for a known mean and biased variance."""
    if triton_device.runs(x):
        return _triton().affine_of(x, mean, var, weight, bias, eps)
    scale, shift = affine_of(mean, var, weight, bias, eps)
    return _per_channel(x, scale), _per_channel(x, shift)


# ---- BatchNorm and neuron in training --------------------------------------------------------------------------------


@torch.library.custom_op("sdt::bn_lif", mutates_args=())
def bn_lif(
    x: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, steps: int, eps: float, threshold: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes `[steps, B, C, H, W]`, and the batch's mean and biased variance `[C]` (float64)."""
    x = with_channels(x)
    mean, var, scale, shift = batch_affine(x, weight, bias, eps)
    spikes = empty_spikes(x, steps)
    _affine_lif(x, scale, shift, spikes, decay, threshold)
    return spikes, mean, var


@bn_lif.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, steps: int, eps: float, threshold: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    channels = weight.new_empty(weight.shape, dtype=torch.float64)
    return empty_spikes(with_channels(x), steps), channels, torch.empty_like(channels)


@torch.library.custom_op("sdt::bn_lif_backward", mutates_args=())
def bn_lif_backward(
    g: Tensor,
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
    x = with_channels(x)
    g = same_layout(g, x, x.dtype)
    if triton_device.runs(x):
        affine = normalising(x, mean, var, weight, bias, eps)
        return _triton_lif().bn_lif_backward(
            g, None, x, affine, weight, mean, var, decay, eps, threshold, alpha, want_decay
        )
    scale, shift = affine_of(mean, var, weight, bias, eps)
    gx = torch.empty_like(x)
    sum_g, sum_gx, g_decay = cpu_kernels.affine_lif_backward(
        g,
        x,
        _per_channel(x, scale),
        _per_channel(x, shift),
        _per_channel(x, mean),
        gx,
        float(decay),
        threshold,
        alpha,
        want_decay,
    )
    g_weight, g_bias = through_batchnorm(gx, x, scale, mean, var, eps, sum_g, sum_gx, gx)
    return gx, g_weight.to(weight.dtype), g_bias.to(bias.dtype), torch.full_like(decay, g_decay)


@bn_lif_backward.register_fake
def _(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(with_channels(x)),
        torch.empty_like(weight),
        torch.empty_like(bias),
        torch.empty_like(decay),
    )


def through_batchnorm(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    sum_g: Tensor,
    sum_gx: Tensor,
    gx: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill `gx` from the gradient `g` of BatchNorm's output; return the gradients of weight and bias (float64).

    With y = (x - mean) * inv * weight + bias over n elements per channel:
    gx = scale * (g - sum(g) / n - (x - mean) * inv^2 * sum(g * (x - mean)) / n).
    """
    n = x.numel() // x.shape[2]
    inv = torch.rsqrt(var + eps)
    q = -scale * inv * inv * sum_gx / n
    r = -scale * sum_g / n
    cpu_kernels.gradient_apply(
        g, x, _per_channel(x, mean), _per_channel(x, scale), _per_channel(x, q), _per_channel(x, r), gx
    )
    return sum_gx * inv, sum_g


def _setup_bn_lif(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, decay, _, ctx.eps, ctx.threshold, ctx.alpha = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)  # no zeros for the two
    ctx.save_for_backward(x, weight, bias, decay, mean, var)


def _bn_lif_grad(ctx, g, g_mean, g_var):  # type: ignore[no-untyped-def]
    wants = ctx.needs_input_grad
    gx, gw, gb, gd = bn_lif_backward(g, *ctx.saved_tensors, ctx.eps, ctx.threshold, ctx.alpha, wants[3])
    return gx, gw, gb, gd if wants[3] else None, None, None, None, None


bn_lif.register_autograd(_bn_lif_grad, setup_context=_setup_bn_lif)


# ---- BatchNorm and a shortcut in training ----------------------------------------------------------------------------


@torch.library.custom_op("sdt::bn_add", mutates_args=())
def bn_add(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of `x`, plus `residual` if there is one; and the batch's mean and biased variance `[C]` (float64)."""
    x = with_channels(x)
    mean, var, scale, shift = batch_affine(x, weight, bias, eps)
    out = torch.empty_like(x)
    _affine(x, scale, shift, _added(residual, x), out)
    return out, mean, var


@bn_add.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    channels = weight.new_empty(weight.shape, dtype=torch.float64)
    return torch.empty_like(with_channels(x)), channels, torch.empty_like(channels)


@torch.library.custom_op("sdt::bn_add_backward", mutates_args=())
def bn_add_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, and of BatchNorm's weight and bias; the residual's is `g` itself."""
    x = with_channels(x)
    g = same_layout(g, x, x.dtype)
    if triton_device.runs(x):
        return _triton().bn_add_backward(g, x, weight, mean, var, eps)
    scale, _ = affine_of(mean, var, weight, bias, eps)
    gx = torch.empty_like(x)
    sum_g, sum_gx = cpu_kernels.gradient_sums(g, x, _per_channel(x, mean))
    g_weight, g_bias = through_batchnorm(g, x, scale, mean, var, eps, sum_g, sum_gx, gx)
    return gx, g_weight.to(weight.dtype), g_bias.to(bias.dtype)


@bn_add_backward.register_fake
def _(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(with_channels(x)), torch.empty_like(weight), torch.empty_like(bias)


def _setup_bn_add(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, residual, ctx.eps = inputs
    ctx.adds = residual is not None
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)  # no zeros for the two
    ctx.save_for_backward(x, weight, bias, mean, var)


def _bn_add_grad(ctx, g, g_mean, g_var):  # type: ignore[no-untyped-def]
    x, *others = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    if is_dense(x):
        g = same_layout(g, x, x.dtype)  # here, since the shortcut hands it on: else each block would copy it
    gx, gw, gb = bn_add_backward(g, x, *others, ctx.eps)
    return gx, gw, gb, g if ctx.adds else None, None


bn_add.register_autograd(_bn_add_grad, setup_context=_setup_bn_add)
