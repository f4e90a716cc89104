"""The multi-step neuron as Triton kernels for CUDA; in Triton's interpreter (TRITON_INTERPRET=1) also on a CPU.

One program walks a block of elements through time with its state in registers: the current is read once, spikes are
written once. The backward kernel finds the membrane potential of each step by walking forward again from the first:
for short runs that is arithmetic on values in cache; for long ones the walk is done once and kept in memory that
lives for the call.

Legend: T time steps, N elements per step.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:  # no wheel for this system
    _MISSING: str | None = f"importing triton failed: {error}"
else:
    _MISSING = None

_BLOCK = 1024
# Up to so many steps the backward kernel walks again for each step, T * (T + 1) / 2 instead of T.
_REWALK_STEPS = 8


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unusable() -> str | None:
    """None, or the reason why Triton kernels cannot run here."""
    if _MISSING:
        return _MISSING
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def lif_forward(x: Tensor, spikes: Tensor, decay: Tensor, threshold: float) -> None:
    """Fill `spikes` `[T, *]` for `x` `[T or 1, *]`, both dense with the same inner strides."""
    T, N, distance = _sizes(x, spikes)
    _forward[(triton.cdiv(N, _BLOCK),)](x, spikes, decay, N, distance, T, threshold, BLOCK=_BLOCK, DOUBLE=_is_double(x))


def lif_backward(g: Tensor, x: Tensor, gx: Tensor, decay: Tensor, threshold: float, alpha: float) -> Tensor:
    """Fill `gx`; return the gradient of the decay, summed block by block in a fixed order."""
    T, N, distance = _sizes(x, g)
    blocks = triton.cdiv(N, _BLOCK)
    rewalk = T <= _REWALK_STEPS
    charged = torch.empty(0 if rewalk else T * N, dtype=decay.dtype, device=x.device)
    partial = torch.empty(blocks, dtype=decay.dtype, device=x.device)
    options = dict(STATIC=distance == 0, REWALK=rewalk, BLOCK=_BLOCK, DOUBLE=_is_double(x))
    _backward[(blocks,)](g, x, gx, charged, partial, decay, N, distance, T, threshold, alpha, **options)
    return partial.sum().reshape(decay.shape)


def _sizes(x: Tensor, steps: Tensor) -> tuple[int, int, int]:
    N = x.numel() // x.shape[0]
    return steps.shape[0], N, N if x.shape[0] == steps.shape[0] else 0


def _is_double(x: Tensor) -> bool:
    return x.dtype == torch.float64


if not _MISSING:

    @triton.jit
    def _charge(x, v, d, at, inside, t, distance, state: tl.constexpr):  # type: ignore[no-untyped-def]
        """The current of step t, and the membrane potential it makes out of v."""
        current = tl.load(x + at + t * distance, mask=inside, other=0.0).to(state)
        return current, v + (current - v) * d

    @triton.jit
    def _forward(  # type: ignore[no-untyped-def]
        x, spikes, decay, N, distance, T, threshold, BLOCK: tl.constexpr, DOUBLE: tl.constexpr
    ):
        state = tl.float64 if DOUBLE else tl.float32
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < N
        d = tl.load(decay).to(state)
        v = tl.zeros((BLOCK,), dtype=state)
        for t in range(T):
            _current, h = _charge(x, v, d, at, inside, t, distance, state)
            fires = h >= threshold
            tl.store(spikes + at + t * N, tl.where(fires, 1.0, 0.0).to(spikes.dtype.element_ty), mask=inside)
            v = tl.where(fires, 0.0, h)

    @triton.jit
    def _backward(  # type: ignore[no-untyped-def]
        g,
        x,
        gx,
        charged,
        partial,
        decay,
        N,
        distance,
        T,
        threshold,
        alpha,
        STATIC: tl.constexpr,
        REWALK: tl.constexpr,
        BLOCK: tl.constexpr,
        DOUBLE: tl.constexpr,
    ):
        state = tl.float64 if DOUBLE else tl.float32
        program = tl.program_id(0).to(tl.int64)
        at = program * BLOCK + tl.arange(0, BLOCK)
        inside = at < N
        d = tl.load(decay).to(state)
        zero = tl.zeros((BLOCK,), dtype=state)
        if not REWALK:
            v = zero
            for t in range(T):
                current, h = _charge(x, v, d, at, inside, t, distance, state)
                tl.store(charged + at + t * N, h, mask=inside)
                v = tl.where(h >= threshold, 0.0, h)
        g_v = zero
        total = zero
        g_decay = zero
        for back in range(T):
            t = T - 1 - back
            v = zero
            if REWALK:
                for earlier in range(t):
                    current, h = _charge(x, v, d, at, inside, earlier, distance, state)
                    v = tl.where(h >= threshold, 0.0, h)
            elif t > 0:
                h = tl.load(charged + at + (t - 1) * N, mask=inside, other=0.0)
                v = tl.where(h >= threshold, 0.0, h)
            current, h = _charge(x, v, d, at, inside, t, distance, state)
            e = tl.exp(-tl.abs(h - threshold) * alpha)
            surrogate = alpha * e / ((1.0 + e) * (1.0 + e))
            g_s = tl.load(g + at + t * N, mask=inside, other=0.0).to(state)
            g_h = g_s * surrogate + tl.where(h >= threshold, 0.0, g_v)
            g_decay += tl.where(inside, g_h * (current - v), 0.0)
            g_in = g_h * d
            g_v = g_h - g_in
            total += g_in
            if not STATIC:
                tl.store(gx + at + t * N, g_in.to(gx.dtype.element_ty), mask=inside)
        if STATIC:
            tl.store(gx + at, total.to(gx.dtype.element_ty), mask=inside)
        tl.store(partial + program, tl.sum(g_decay))
