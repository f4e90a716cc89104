"""Layers of a part that are computed together by one operator.

Each function equals the plain calls that its first line names. It runs them as one operator where each layer is
exactly what the operator computes and nobody watches one of them with a hook, and one by one otherwise: whoever
measures from outside sees every output.

Legend: T time steps, B batch, C channels, H x W feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from module.kernels import batchnorm, cpu, norm_pool, pool, triton_device, winograd
from module.kernels.lif import once
from module.kernels.neurons import KernelNeuron
from module.kernels.substitute import watched
from module.layers import over_time


def channels_innermost(x: Tensor) -> Tensor:
    """`x` `[T, B, C, H, W]` with channels innermost in memory, which these operators are fastest on."""
    if x.stride(2) == 1 and x.shape[2] > 1:
        return x
    if len(first := once(x)) < len(x):  # the same image at each step stays one image
        return channels_innermost(first).expand(x.shape)
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])


def can_fuse_norms(x: Tensor, *norms: nn.Module) -> bool:
    """Whether the kernels compute these BatchNorms of `x`: not synchronised or split ones."""
    for norm in norms:
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d) or not norm.affine or norm.running_mean is None:
            return False
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        if norm.weight.dtype != cpu.state_dtype(x.dtype) or norm.training != norms[0].training:
            return False
    # The evaluation kernels have no gradient.
    return triton_device.usable(x) and not watched(*norms) and (norms[0].training or not torch.is_grad_enabled())


def is_folded(*norms: nn.Module) -> bool:
    """Whether BatchNorms were folded into their convolutions."""
    return all(type(norm) is nn.Identity for norm in norms) and not watched(*norms)


def can_fuse_neurons(x: Tensor, *neurons: nn.Module) -> bool:
    """Whether the neurons run on the compiled kernels for an input like `x`."""
    kernel = "triton" if triton_device.runs(x) else "cpp"
    if kernel == "triton" and x.shape[0] > triton_device.MOST_STEPS:
        return False
    return not watched(*neurons) and all(
        isinstance(neuron, KernelNeuron) and neuron.kernel == kernel and neuron.may_run(x) for neuron in neurons
    )


def norm_neuron(norm: nn.Module, neuron: nn.Module, x: Tensor, steps: int | None = None) -> Tensor:
    """`neuron(over_time(x, norm))`.

    Args:
        x: `[T, B, C, H, W]`, or `[1, B, C, H, W]` for an input that is the same at each of `steps` steps.

    Returns:
        Spikes `[T, B, C, H, W]`.
    """
    steps = steps or x.shape[0]
    if can_fuse_norms(x, norm) and can_fuse_neurons(x, neuron):
        assert isinstance(neuron, KernelNeuron)
        return norms_neurons([norm], [neuron], x, steps)
    if x.shape[0] != steps:
        x = x.expand(steps, *x.shape[1:])
    return channels_innermost(neuron(norm_add(norm, x)))  # a neuron that stacks its steps loses the layout


def norm_neuron_pool(
    norm: nn.Module, neuron: nn.Module, layer: nn.Module, x: Tensor, steps: int | None = None
) -> Tensor:
    """`over_time(neuron(over_time(x, norm)), layer)` for a max-pool; `x` and `steps` as in `norm_neuron`."""
    steps = steps or x.shape[0]
    if not (
        triton_device.runs(x)
        and steps <= norm_pool.MOST_STEPS
        and pool.can_pool(layer, x.flatten(0, 1))
        and can_fuse_norms(x, norm)
        and can_fuse_neurons(x, neuron)
        and not watched(layer)
    ):
        return pooled(layer, norm_neuron(norm, neuron, x, steps))
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(neuron, KernelNeuron)
    decay, (threshold, alpha) = neuron.decay(x), neuron.constants()
    if not norm.training:
        return norm_pool.affine_lif_pool(x, *running_affine(norm), decay, steps, threshold)
    keep = torch.is_grad_enabled()
    arguments = (decay, steps, norm.eps, threshold, alpha, keep)
    out, mean, var, _ = norm_pool.bn_lif_pool(x, norm.weight, norm.bias, *arguments)
    _update_running(norm, mean, var, x.numel() // x.shape[2] // x.shape[0] * steps)
    return out


def norms_neurons(norms: Sequence[nn.Module], neurons: Sequence[KernelNeuron], x: Tensor, steps: int) -> Tensor:
    """Several BatchNorms side by side over the channels of `x`, each followed by its neuron; fused.

    A single neuron stands for neurons that are all like it; else they differ in their time constants alone.
    """
    threshold, alpha = neurons[0].constants()
    decay = torch.stack([n.decay(x) for n in neurons]) if len(neurons) > 1 else neurons[0].decay(x)
    if not norms[0].training:
        scales, shifts = zip(*map(running_affine, norms), strict=True)
        return batchnorm.affine_lif(x, _joined(scales), _joined(shifts), decay, steps, threshold)
    weight, bias = joined_affine(norms)
    spikes, mean, var = batchnorm.bn_lif(x, weight, bias, decay, steps, norms[0].eps, threshold, alpha)
    update_running(norms, mean, var, x.numel() // x.shape[2] // x.shape[0] * steps)
    return spikes


def norm_add(norm: nn.Module, x: Tensor, residual: Tensor | None = None, steps: int | None = None) -> Tensor:
    """`over_time(x, norm)`, plus `residual` if there is one, all `[T, B, C, H, W]`; `x` and `steps` as in
    `norm_neuron`, without a `residual`."""
    steps = steps or x.shape[0]
    if can_fuse_norms(x, norm):
        if residual is None or x.dtype == residual.dtype:
            return norms_add([norm], x, residual, steps)
        y = norms_add([norm], x, None, steps)
    else:
        y = over_time(x.expand(steps, *x.shape[1:]), norm)
    return y if residual is None else y + residual


def norms_add(norms: Sequence[nn.Module], x: Tensor, residual: Tensor | None, steps: int) -> Tensor:
    """Several BatchNorms side by side over the channels of `x`, plus `residual`; fused."""
    first = norms[0]
    if not first.training:
        scales, shifts = zip(*map(running_affine, norms), strict=True)
        out = batchnorm.affine_add(x, _joined(scales), _joined(shifts), residual)
    else:
        weight, bias = joined_affine(norms)
        out, mean, var = batchnorm.bn_add(x, weight, bias, residual, first.eps)
        update_running(norms, mean, var, x.numel() // x.shape[2] // x.shape[0] * steps)
    return out.expand(steps, *x.shape[1:])


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """`over_time(x, conv)`, with the gradients of a 3 x 3 convolution computed by Winograd's algorithm."""
    if (
        type(conv) is nn.Conv2d
        and cpu.same_size_kernel(conv) == 3
        and x.requires_grad
        and x.dtype == conv.weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and not triton_device.runs(x)
        and cpu.usable(x)
        and winograd.is_faster(conv.weight, x.dtype)
        and not watched(conv)
    ):
        return winograd.conv3x3(x.flatten(0, 1), conv.weight, conv.bias).unflatten(0, x.shape[:2])
    return over_time(x, conv)


def pooled(layer: nn.Module, x: Tensor) -> Tensor:
    """`over_time(x, layer)` for a max-pool."""
    flat = x.flatten(0, 1)
    if pool.can_pool(layer, flat) and not watched(layer):
        return pool.max_pool(flat).unflatten(0, x.shape[:2])
    return over_time(x, layer)


def neighbours_pooled(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` for the event mode's max-pool over 3 x 3 neighbours in the last two dimensions of `x`."""
    if pool.can_pool_neighbours(layer, x) and not watched(layer):
        return pool.max_pool_neighbours(x)
    pooled: Tensor = layer(x)
    return pooled


def joined_affine(norms: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Weights and biases of BatchNorms side by side over channels."""
    return _joined([norm.weight for norm in norms]), _joined([norm.bias for norm in norms])


def update_running(norms: Sequence[Any], mean: Tensor, var: Tensor, count: int) -> None:
    """Of BatchNorms side by side over channels: `mean` and biased `var` are those of all, over `count` values."""
    for norm, its_mean, its_var in zip(norms, mean.chunk(len(norms)), var.chunk(len(norms)), strict=True):
        _update_running(norm, its_mean, its_var, count)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def running_affine(norm: Any) -> tuple[Tensor, Tensor]:
    return batchnorm.affine_of(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def _update_running(norm: Any, mean: Tensor, var: Tensor, count: int) -> None:
    """As BatchNorm does it: running means of the mean and of the unbiased variance over `count` values."""
    if not norm.track_running_stats:
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
    unbiased = var * (count / max(count - 1, 1))
    running = [norm.running_mean, norm.running_var]
    torch._foreach_lerp_(running, [value.to(running[0].dtype) for value in (mean, unbiased)], momentum)
