"""The multi-step neuron as Triton kernels: the current is read once, spikes are written once.

Legend: T time steps, N elements per step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from module.kernels.triton_common import block, charge, launch, slope, state

_WIDE = 1024  # elements of one block that keeps nothing


def lif_forward(x: Tensor, spikes: Tensor, decay: Tensor, threshold: float) -> None:
    """Fill `spikes` `[T, *]` for `x` `[T or 1, *]`, both dense with the same inner strides."""
    T, N = spikes.shape[0], x.numel() // x.shape[0]
    options = dict(THRESHOLD=threshold, T=T, STATIC=len(x) < T, BLOCK=_WIDE, STATE=state(x))
    launch(_forward, (triton.cdiv(N, _WIDE),), x, spikes, decay, N, **options)


def lif_backward(
    g: Tensor, x: Tensor, gx: Tensor, decay: Tensor, threshold: float, alpha: float, want_decay: bool
) -> Tensor:
    """Fill `gx`; return the gradient of the decay, if wanted, summed block by block in a fixed order."""
    T, N = g.shape[0], x.numel() // x.shape[0]
    size = block(T)
    blocks = triton.cdiv(N, size)
    partial = torch.empty(blocks if want_decay else 0, dtype=decay.dtype, device=x.device)
    options = dict(STATIC=len(x) < T, WANT_DECAY=want_decay, BLOCK=size, STATE=state(x))
    constants = dict(THRESHOLD=threshold, ALPHA=alpha, T=T)
    launch(_backward, (blocks,), g, x, gx, partial, decay, N, (T - 1) * N, **constants, **options)
    # Nothing is launched for a sum that nobody asked for.
    return partial.sum().reshape(decay.shape) if want_decay else torch.empty_like(decay)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    spikes,
    decay,
    N,
    THRESHOLD: tl.constexpr,
    T: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    d = tl.load(decay).to(STATE)
    v = tl.zeros((BLOCK,), dtype=STATE)
    for _ in tl.static_range(T):
        h = charge(v, tl.load(x + at, mask=inside, other=0.0).to(STATE), d)
        fires = h >= THRESHOLD
        tl.store(spikes + at, tl.where(fires, 1.0, 0.0).to(spikes.dtype.element_ty), mask=inside)
        v = tl.where(fires, 0.0, h)
        spikes += N
        if not STATIC:
            x += N


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    g,
    x,
    gx,
    partial,
    decay,
    N,
    last,
    THRESHOLD: tl.constexpr,
    ALPHA: tl.constexpr,
    T: tl.constexpr,
    STATIC: tl.constexpr,
    WANT_DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    d = tl.load(decay).to(STATE)
    zero = tl.zeros((BLOCK,), dtype=STATE)
    v = zero
    potentials = ()
    from_x = x
    for _ in tl.static_range(T):
        h = charge(v, tl.load(from_x + at, mask=inside, other=0.0).to(STATE), d)
        v = tl.where(h >= THRESHOLD, 0.0, h)
        potentials = potentials + (h,)  # type: ignore[assignment]  # noqa: RUF005 (the compiler knows no star)
        if not STATIC:
            from_x += N
    g_v = zero
    total = zero
    g_decay = zero
    g += last
    if not STATIC:
        x += last
        gx += last
    for back in tl.static_range(T):
        h = potentials[T - 1 - back]
        g_s = tl.load(g + at, mask=inside, other=0.0).to(STATE)
        g_h = g_s * slope(h, THRESHOLD, ALPHA) + tl.where(h >= THRESHOLD, 0.0, g_v)
        g_in = g_h * d
        g_v = g_h - g_in
        if WANT_DECAY:
            driven = tl.load(x + at, mask=inside, other=0.0).to(STATE)
            if back < T - 1:
                before = potentials[T - 2 - back]  # type: ignore[var-annotated]
                driven -= tl.where(before >= THRESHOLD, 0.0, before)
            g_decay += tl.where(inside, g_h * driven, 0.0)
        g -= N
        if STATIC:
            total += g_in
        else:
            tl.store(gx + at, g_in.to(gx.dtype.element_ty), mask=inside)
            x -= N
            gx -= N
    if STATIC:
        tl.store(gx + at, total.to(gx.dtype.element_ty), mask=inside)
    if WANT_DECAY:
        tl.store(partial + program, tl.sum(g_decay))
