"""The multi-step neuron in vectorised torch operations, for any device and dtype: the fallback of the compiled
kernels, and what they are compared with. Like them it needs only the input to compute the gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, spikes: Tensor, decay: Tensor, threshold: float) -> None:
    """Fill `spikes` `[T, *]` for the current `x` `[T or 1, *]`; the state has `decay`'s dtype."""
    v: Tensor | None = None
    for t, out in enumerate(spikes.unbind(0)):
        h = _charge(x[t if len(x) > 1 else 0].to(decay.dtype), v, decay)
        fires = h >= threshold
        out.copy_(fires)
        v = h.masked_fill_(fires, 0.0)


def backward(
    g: Tensor, x: Tensor, gx: Tensor, decay: Tensor, threshold: float, alpha: float, want_decay: bool
) -> Tensor:
    """Fill `gx` (shape of `x`); return the gradient of the decay, 0 if unwanted. Walks through time twice."""
    steps, static = len(g), len(x) < len(g)
    charged: list[Tensor] = []  # h[t]
    v: Tensor | None = None
    for t in range(steps):
        h = _charge(x[0 if static else t].to(decay.dtype), v, decay)
        charged.append(h)
        v = h.masked_fill(h >= threshold, 0.0)
    g_v = torch.zeros_like(charged[0])
    g_decay = torch.zeros_like(decay)
    total = torch.zeros_like(charged[0]) if static else None
    for t in reversed(range(steps)):
        h = charged.pop()
        # The surrogate's derivative, alpha * sig * (1 - sig).
        sig = torch.sigmoid((h - threshold).mul_(alpha))
        g_h = sig.mul_(1.0 - sig).mul_(alpha).mul_(g[t])
        g_h += g_v.masked_fill_(h >= threshold, 0.0)  # no gradient through the reset
        if want_decay:
            current = x[0 if static else t].to(decay.dtype)
            driven = current - charged[-1].masked_fill(charged[-1] >= threshold, 0.0) if t else current
            g_decay += (g_h * driven).sum()
        g_in = g_h * decay
        g_v = g_h.sub_(g_in)
        if total is None:
            gx[t] = g_in
        else:
            total += g_in
    if total is not None:
        gx[0] = total
    return g_decay


def _charge(current: Tensor, v: Tensor | None, decay: Tensor) -> Tensor:
    return current * decay if v is None else (current - v).mul_(decay).add_(v)
