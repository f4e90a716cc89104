"""A depthwise k x k and the 1x1 convolution after it on a CPU, as torch operators: alone, of spikes (V2's separable
convolution), and behind a BatchNorm whose border is its image of zero (V2's RepConv).

Neither what lies between the two convolutions nor the normalised values are kept for the backward pass: both are
computed again from the operator's input, the spikes among which are kept as bits. torch's own backward pass of a
depthwise convolution takes 5 to 20 times as long as these kernels.

Legend: N images, C channels, H x W feature map, M output channels, G groups of the 1x1 convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from module.kernels import cpu as cpu_kernels
from module.kernels.batchnorm import affine_of, through_batchnorm
from module.kernels.cpu import Affine, state_dtype
from module.kernels.spike_conv import empty, in_autocast, innermost, kept, rows
from module.kernels.substitute import plain_class

KERNELS = (3, 7)


def fits(depthwise: nn.Module, pointwise: nn.Module, padding: int | None = None) -> bool:
    """Whether the operators compute these two layers: no bias, same size (or the given padding), one channel each."""
    if not (isinstance(depthwise, nn.Conv2d) and isinstance(pointwise, nn.Conv2d)):
        return False
    k = depthwise.kernel_size[0]
    padding = k // 2 if padding is None else padding
    return (
        (plain_class(depthwise), plain_class(pointwise)) == (nn.Conv2d, nn.Conv2d)
        and k in KERNELS
        and depthwise.kernel_size == (k, k)
        and depthwise.padding == (padding, padding)
        and depthwise.groups == depthwise.in_channels == depthwise.out_channels
        and (pointwise.kernel_size, pointwise.groups, pointwise.padding) == ((1, 1), 1, (0, 0))
        and all(c.stride == c.dilation == (1, 1) and c.padding_mode == "zeros" for c in (depthwise, pointwise))
        and depthwise.bias is None
        and pointwise.bias is None
    )


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """`[C, 1, k, k]` -> `[k * k, C]` in the dtype that the kernels compute in."""
    return weight.flatten(1).T.to(state_dtype(x.dtype)).contiguous()


def _depthwise(x: Tensor, affine: Affine | None, taps: Tensor) -> Tensor:
    out = empty(x, *x.shape)
    cpu_kernels.depthwise(x, affine, taps, out)
    return out


def _products(x: Tensor, weight: Tensor, groups: int, out: Tensor) -> None:
    """`out` `[P, M]` from `x` `[P, C]` and `weight` `[M, C / G]`: group by group, a product of matrices."""
    for a, w, part in zip(x.chunk(groups, 1), weight.chunk(groups), out.chunk(groups, 1), strict=True):
        torch.mm(a, w.T, out=part)


def _both(x: Tensor, affine: Affine | None, depthwise: Tensor, pointwise: Tensor, groups: int) -> Tensor:
    N, _, H, W = x.shape
    out = empty(x, N, len(pointwise), H, W)
    between = _depthwise(x, affine, _taps(depthwise, x))
    _products(rows(between), pointwise.flatten(1).to(x.dtype), groups, rows(out))
    return out


def _gradients(
    g: Tensor, x: Tensor, affine: Affine | None, depthwise: Tensor, pointwise: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the (normalised) input and of both weights."""
    between, g_between = _depthwise(x, affine, _taps(depthwise, x)), empty(x, *x.shape)
    matrix = pointwise.flatten(1).to(x.dtype)
    g_rows, b_rows, to_rows = (t.chunk(groups, 1) for t in (rows(g), rows(between), rows(g_between)))
    g_pointwise = torch.cat([a.T @ b for a, b in zip(g_rows, b_rows, strict=True)])
    for a, w, part in zip(g_rows, matrix.chunk(groups), to_rows, strict=True):
        torch.mm(a, w, out=part)
    k = depthwise.shape[-1]
    g_taps = cpu_kernels.depthwise_weight_gradient(x, affine, g_between, k)  # [k * k, C]
    gx = _depthwise(g_between, None, _taps(depthwise.flip(2, 3), x))
    return (
        gx,
        g_taps.T.reshape(depthwise.shape).to(depthwise.dtype),
        g_pointwise.to(pointwise.dtype).view(pointwise.shape),
    )


# ---- of spikes -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("sdt::spike_depthwise_pointwise", mutates_args=(), device_types="cpu")
def _of_spikes(x: Tensor, depthwise: Tensor, pointwise: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    x = innermost(x)
    out = _both(x, None, depthwise, pointwise, 1)
    return out, cpu_kernels.pack_bits(x) if keep else x.new_empty(0, dtype=torch.uint8)


@_of_spikes.register_fake
def _(x: Tensor, depthwise: Tensor, pointwise: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    N, _, H, W = x.shape
    return empty(x, N, len(pointwise), H, W), x.new_empty((x.numel() + 7) // 8 if keep else 0, dtype=torch.uint8)


@torch.library.custom_op("sdt::spike_depthwise_pointwise_backward", mutates_args=(), device_types="cpu")
def _of_spikes_backward(
    g: Tensor, bits: Tensor, depthwise: Tensor, pointwise: Tensor, shape: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(innermost(g), kept(bits, g, *shape), None, depthwise, pointwise, 1)


@_of_spikes_backward.register_fake
def _(g: Tensor, bits: Tensor, depthwise: Tensor, pointwise: Tensor, shape: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return empty(g, *shape), torch.empty_like(depthwise), torch.empty_like(pointwise)


def _setup_of_spikes(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, depthwise, pointwise, _ = inputs
    _, bits = output
    ctx.shape = list(x.shape)
    ctx.mark_non_differentiable(bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(bits, depthwise, pointwise)


def _of_spikes_grad(ctx, g, g_bits):  # type: ignore[no-untyped-def]
    return *_of_spikes_backward(g, *ctx.saved_tensors, ctx.shape), None


_of_spikes.register_autograd(_of_spikes_grad, setup_context=_setup_of_spikes)


def of_spikes(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """Both convolutions of the spikes `x` `[N, C, H, W]` (0 and 1 alone) -> `[N, M, H, W]`."""
    out: Tensor = _of_spikes(in_autocast(x), depthwise, pointwise, torch.is_grad_enabled())[0]
    return out


# ---- behind a BatchNorm with a border --------------------------------------------------------------------------------


@torch.library.custom_op("sdt::affine_depthwise_pointwise", mutates_args=(), device_types="cpu")
def behind_affine(x: Tensor, scale: Tensor, shift: Tensor, depthwise: Tensor, pointwise: Tensor, groups: int) -> Tensor:
    """Both convolutions of `x * scale + shift`, with a border of `shift`: BatchNorm in evaluation, and its image of
    zero. No gradient."""
    per_channel = [v.to(state_dtype(x.dtype)).contiguous() for v in (scale, shift)]
    return _both(innermost(x), (*per_channel, per_channel[1]), depthwise, pointwise, groups)  # type: ignore[arg-type]


@behind_affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, depthwise: Tensor, pointwise: Tensor, groups: int) -> Tensor:
    N, _, H, W = x.shape
    return empty(x, N, len(pointwise), H, W)


def _affine(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor], mean: Tensor, var: Tensor,
    momentum: float, eps: float,
) -> Affine:  # fmt: skip
    """Inside, BatchNorm by the batch; the border, by the running statistics after this batch."""
    scale, shift = affine_of(mean, var, weight, bias, eps)
    count = x.numel() // x.shape[1]
    after = [
        old.double().lerp(new, momentum)
        for old, new in zip(running, (mean, var * count / max(count - 1, 1)), strict=True)
    ]
    border = bias.double() - after[0] * weight.double() * torch.rsqrt(after[1] + eps)
    scale, shift, border = (v.to(state_dtype(x.dtype)).contiguous() for v in (scale, shift, border))
    return scale, shift, border


@torch.library.custom_op("sdt::bn_depthwise_pointwise", mutates_args=(), device_types="cpu")
def behind_batchnorm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    depthwise: Tensor, pointwise: Tensor, groups: int, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Both convolutions of BatchNorm of `x` `[N, C, H, W]`, with the border of RepConv (module/v2/repconv.py); the
    batch's mean and biased variance `[C]` (float64); and the border `[C]`. The running statistics are read here, and
    updated by the caller."""
    x = innermost(x)
    mean, var = cpu_kernels.mean_and_variance(x[None])
    affine = _affine(x, weight, bias, (running_mean, running_var), mean, var, momentum, eps)
    return _both(x, affine, depthwise, pointwise, groups), mean, var, affine[2]


@behind_batchnorm.register_fake
def _(x, weight, bias, running_mean, running_var, depthwise, pointwise, groups, momentum, eps):  # type: ignore[no-untyped-def]
    N, _, H, W = x.shape
    channels = weight.new_empty(weight.shape, dtype=torch.float64)
    border = weight.new_empty(weight.shape, dtype=state_dtype(x.dtype))
    return empty(x, N, len(pointwise), H, W), channels, torch.empty_like(channels), border


@torch.library.custom_op("sdt::bn_depthwise_pointwise_backward", mutates_args=(), device_types="cpu")
def _behind_batchnorm_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, border: Tensor,
    depthwise: Tensor, pointwise: Tensor, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the input, of BatchNorm's weight and bias, and of both convolutions' weights."""
    x, g = innermost(x), innermost(g)
    scale, shift = affine_of(mean, var, weight, bias, eps)
    affine = tuple(v.to(state_dtype(x.dtype)).contiguous() for v in (scale, shift, border))
    g_inside, g_depthwise, g_pointwise = _gradients(g, x, affine, depthwise, pointwise, groups)  # type: ignore[arg-type]
    five = (g_inside.unsqueeze(0), x.unsqueeze(0))
    sum_g, sum_gx = cpu_kernels.gradient_sums(*five, mean.to(state_dtype(x.dtype)))
    g_weight, g_bias = through_batchnorm(*five, scale, mean, var, eps, sum_g, sum_gx, five[0])
    return g_inside, g_weight.to(weight.dtype), g_bias.to(bias.dtype), g_depthwise, g_pointwise


@_behind_batchnorm_backward.register_fake
def _(g, x, weight, bias, mean, var, border, depthwise, pointwise, groups, eps):  # type: ignore[no-untyped-def]
    return empty(x, *x.shape), *(torch.empty_like(t) for t in (weight, bias, depthwise, pointwise))


def _setup_behind_batchnorm(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, _, _, depthwise, pointwise, ctx.groups, _, ctx.eps = inputs
    _, mean, var, border = output
    ctx.mark_non_differentiable(mean, var, border)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, var, border, depthwise, pointwise)


def _behind_batchnorm_grad(ctx, g, g_mean, g_var, g_border):  # type: ignore[no-untyped-def]
    gx, gw, gb, gd, gp = _behind_batchnorm_backward(g, *ctx.saved_tensors, ctx.groups, ctx.eps)
    return gx, gw, gb, None, None, gd, gp, None, None, None


behind_batchnorm.register_autograd(_behind_batchnorm_grad, setup_context=_setup_behind_batchnorm)
