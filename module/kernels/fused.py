"""Where modules may be computed together, and the calls that do it.

A group of modules (a BatchNorm and its neuron, say) runs as one operator when each of them is what the operator
computes, runs on a CPU with compiled kernels, and nobody watches: a module with a forward hook is executed by
itself, so that whoever measures from outside sees every output as before.

Legend: T time steps, B batch, C channels, H x W feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from module.kernels import batchnorm as norm_ops
from module.kernels import pool as pool_ops
from module.kernels import winograd
from module.kernels.conv_geometry import same_size_kernel
from module.kernels.lif import state_dtype
from module.neuron import SpikingNode, backend_of


def over_time(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer that knows no time to `x` `[T, B, C, H, W]`; BatchNorm statistics span time and batch."""
    T, B = x.shape[:2]
    y: Tensor = layer(x.flatten(0, 1))  # [T*B, C, H, W]
    return y.unflatten(0, (T, B))  # [T, B, C', H', W']


def watched(*modules: nn.Module) -> bool:
    """Whether a hook is attached to any of the modules (or to all there are), or one's forward was replaced."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return True
    # What torch.compile traces is the module's own forward; it cannot look into an instance's dictionary either.
    replaced = not torch.compiler.is_compiling() and any("forward" in vars(m) for m in modules)
    return replaced or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )


def can_fuse_norms(x: Tensor, *norms: nn.Module) -> bool:
    """Whether BatchNorms of the input `x` can run on the compiled kernels: no synchronised or split kind."""
    for norm in norms:
        if type(norm) is not nn.BatchNorm2d or not norm.affine or norm.running_mean is None:
            return False
        if norm.weight.dtype != state_dtype(x.dtype):
            return False
    # The evaluation kernels have no gradient.
    return not watched(*norms) and (norms[0].training or not torch.is_grad_enabled())


def is_folded(*norms: nn.Module) -> bool:
    """Whether BatchNorms were folded into their convolutions."""
    return all(type(norm) is nn.Identity for norm in norms) and not watched(*norms)


def can_fuse_neurons(x: Tensor, *neurons: nn.Module) -> bool:
    """Whether the neurons run on the compiled kernels for an input like `x`."""
    return not watched(*neurons) and all(backend_of(neuron, x) == "cpp" for neuron in neurons)


def norm_neuron(norm: nn.Module, neuron: nn.Module, x: Tensor, steps: int | None = None) -> Tensor:
    """`neuron(norm(x))`.

    Args:
        x: `[T, B, C, H, W]`, or `[1, B, C, H, W]` for an input that is the same at each of `steps` steps.

    Returns:
        Spikes `[T, B, C, H, W]`.
    """
    steps = steps or x.shape[0]
    if can_fuse_norms(x, norm) and can_fuse_neurons(x, neuron):
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(neuron, SpikingNode)
        return norms_neuron([norm], neuron, x, steps)
    if x.shape[0] != steps:
        x = x.expand(steps, *x.shape[1:])
    spikes: Tensor = neuron(over_time(norm, x))
    return spikes


def norms_neuron(norms: Sequence[nn.BatchNorm2d], neuron: SpikingNode, x: Tensor, steps: int) -> Tensor:
    """Several BatchNorms side by side over the channels of `x`, each followed by a neuron like `neuron`; fused."""
    decay, (threshold, alpha) = neuron.decay(x), neuron.constants()
    if not norms[0].training:
        scales, shifts = zip(*map(_running_affine, norms), strict=True)
        return norm_ops.affine_lif(x, _joined(scales), _joined(shifts), decay, steps, threshold)
    weight, bias = _joined([norm.weight for norm in norms]), _joined([norm.bias for norm in norms])
    spikes, mean, var = norm_ops.bn_lif(x, weight, bias, decay, steps, norms[0].eps, threshold, alpha)
    count = x.numel() // x.shape[2] // x.shape[0] * steps
    means, variances = mean.chunk(len(norms)), var.chunk(len(norms))
    for norm, its_mean, its_var in zip(norms, means, variances, strict=True):
        _update_running(norm, its_mean, its_var, count)
    return spikes


def norm_add(norm: nn.Module, x: Tensor, residual: Tensor | None, neuron: nn.Module) -> Tensor:
    """`norm(x)`, plus `residual` if there is one, all `[T, B, C, H, W]`; compiled where `neuron`, one of the same
    model, would be."""
    same = residual is None or x.dtype == residual.dtype
    if same and can_fuse_norms(x, norm) and backend_of(neuron, x) == "cpp":
        assert isinstance(norm, nn.BatchNorm2d)
        if not norm.training:
            return norm_ops.affine_add(x, *_running_affine(norm), residual)
        out, mean, var = norm_ops.bn_add(x, norm.weight, norm.bias, residual, norm.eps)
        _update_running(norm, mean, var, x.numel() // x.shape[2])
        return out
    y = over_time(norm, x)
    return y if residual is None else y + residual


def convolved(conv: nn.Module, x: Tensor, neuron: nn.Module) -> Tensor:
    """`conv(x)` for `x` `[T, B, C, H, W]`; with the faster gradients where `neuron`, one of the same model, would be
    compiled."""
    if (
        isinstance(conv, nn.Conv2d)
        and same_size_kernel(conv) == 3
        and x.requires_grad
        and x.dtype == conv.weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and backend_of(neuron, x) == "cpp"
        and winograd.pays(conv.weight, x.dtype)
        and not watched(conv)
    ):
        return winograd.conv3x3(x.flatten(0, 1), conv.weight, conv.bias).unflatten(0, x.shape[:2])
    return over_time(conv, x)


def pooled(pool: nn.Module, x: Tensor, neuron: nn.Module) -> Tensor:
    """`pool(x)` for `x` `[T, B, C, H, W]`; compiled where `neuron`, one of the same model, would be."""
    flat = x.flatten(0, 1)
    if pool_ops.can_pool(pool, flat) and not watched(pool) and backend_of(neuron, x) == "cpp":
        return pool_ops.max_pool(flat).unflatten(0, x.shape[:2])
    return over_time(pool, x)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _running_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm_ops.affine_of(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """As BatchNorm does it: running means of the mean and of the unbiased variance over `count` values."""
    if not norm.track_running_stats:
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
    unbiased = var * (count / max(count - 1, 1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
