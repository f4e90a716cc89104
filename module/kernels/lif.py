"""The multi-step neuron as one torch operator, `sdt::lif`, with its gradient and shape inference, so that autograd,
`torch.compile`, `torch.export` and activation checkpointing see a single node that keeps one tensor: its input.

SpikingJelly's neuron keeps several tensors per time step for the backward pass; here the membrane potentials are
computed again from the input, which is a fraction of the memory traffic.

The kernels: `cpp` (compiled, CPU), `triton` (CUDA), `lean` (vectorised torch, anywhere).

Legend: T time steps, `*` any further dimensions. The input may be `[1, *]`: the same current at each of `steps` steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from module.kernels import cpu as cpu_kernels
from module.kernels import lif_torch as lean_lif
from module.kernels import triton_device

KERNELS = ("cpp", "triton", "lean")


def is_dense(x: Tensor) -> bool:
    """Whether `x` has time outermost and no gaps, whatever the order of its other dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return x.shape[0] == 1 or x.stride(0) * x.shape[0] == x.numel()


def once(x: Tensor) -> Tensor:
    """`[1, *]` of an input `x` `[T, *]` that is the same at each step; otherwise `x`.

    Also `x` where it needs a gradient: that of one step would hold those of all, and the other steps would have none.
    """
    return x[:1] if x.stride(0) == 0 and not x.requires_grad else x


def dense(x: Tensor) -> Tensor:
    """`x`, copied only if it is not dense."""
    if is_dense(x):
        return x
    # One step that stands for all keeps its layout.
    return same_layout(x, x[:1], x.dtype) if x.stride(0) == 0 and is_dense(x[:1]) else x.contiguous()


def same_layout(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`g` with the strides of `x[0]` at each step, and in `dtype`; copied only if they differ."""
    strides = output_strides(x)
    if g.dtype == dtype and all(size == 1 or a == b for a, b, size in zip(g.stride(), strides, g.shape, strict=True)):
        return g
    return torch.empty_strided(g.shape, strides, dtype=dtype, device=g.device).copy_(g)


def output_strides(x: Tensor) -> tuple[int, ...]:
    return (x.numel() // x.shape[0], *x.stride()[1:])


def empty_spikes(x: Tensor, steps: int) -> Tensor:
    """`[steps, *]` in the memory order of the dense `x` `[steps or 1, *]`."""
    return torch.empty_strided((steps, *x.shape[1:]), output_strides(x), dtype=x.dtype, device=x.device)


def _triton_for(x: Tensor) -> Any:
    """The Triton kernels, which take long to import.

    Raises:
        ValueError: `x` is not where they run.
    """
    from module.kernels import triton_lif

    if not triton_device.runs(x):
        raise ValueError(f"neuron kernel 'triton' runs on CUDA devices, and its input is on {x.device}")
    return triton_lif


@torch.library.custom_op("sdt::lif", mutates_args=())
def lif(x: Tensor, decay: Tensor, steps: int, threshold: float, alpha: float, kernel: str) -> Tensor:
    """Spikes `[steps, *]` in `x`'s dtype for the currents `x` `[steps or 1, *]`; `decay` (1/tau) is 0-dimensional."""
    x = dense(x)
    spikes = empty_spikes(x, steps)
    if kernel == "triton" and steps > triton_device.MOST_STEPS:
        kernel = "lean"
    if kernel == "cpp":
        cpu_kernels.lif_forward(x, spikes, float(decay), threshold)
    elif kernel == "triton":
        _triton_for(x).lif_forward(x, spikes, decay, threshold)
    else:
        lean_lif.forward(x, spikes, decay, threshold)
    return spikes


@lif.register_fake
def _(x: Tensor, decay: Tensor, steps: int, threshold: float, alpha: float, kernel: str) -> Tensor:
    return empty_spikes(dense(x), steps)


@torch.library.custom_op("sdt::lif_backward", mutates_args=())
def lif_backward(
    g: Tensor, x: Tensor, decay: Tensor, threshold: float, alpha: float, kernel: str, want_decay: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the current (shape of `x`) and, if wanted, of the decay, from `g` `[steps, *]`."""
    x = dense(x)
    g = same_layout(g, x, x.dtype)
    gx = torch.empty_like(x)
    constants = (threshold, alpha, want_decay)
    if kernel == "triton" and len(g) > triton_device.MOST_STEPS:
        kernel = "lean"
    if kernel == "cpp":
        return gx, torch.full_like(decay, cpu_kernels.lif_backward(g, x, gx, float(decay), *constants))
    if kernel == "triton":
        return gx, _triton_for(x).lif_backward(g, x, gx, decay, *constants)
    return gx, lean_lif.backward(g, x, gx, decay, *constants)


@lif_backward.register_fake
def _(g: Tensor, x: Tensor, decay: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), torch.empty_like(decay)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, decay, _, ctx.threshold, ctx.alpha, ctx.kernel = inputs
    ctx.save_for_backward(x, decay)


def _backward(ctx, g):  # type: ignore[no-untyped-def]
    x, decay = ctx.saved_tensors
    wants = ctx.needs_input_grad[1]
    gx, g_decay = lif_backward(g, x, decay, ctx.threshold, ctx.alpha, ctx.kernel, wants)
    return gx, g_decay if wants else None, None, None, None, None


lif.register_autograd(_backward, setup_context=_setup_context)
