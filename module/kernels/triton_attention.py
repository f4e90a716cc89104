"""Spike-driven self-attention as Triton kernels; see module/kernels/attention.py.

For the backward pass q, k and v, which are spikes, are kept as three bits of one byte.

Legend: T time steps, B batch, D channels (innermost in memory), N tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from module.kernels.triton_common import launch, state
from module.kernels.triton_lif import lif_backward, lif_forward
from module.kernels.triton_pool import places

_TILE = (16, 64)  # tokens and channels of one block


def attend(qkv: Tensor, kv: Tensor, y: Tensor, kept: Tensor | None, decay: Tensor, threshold: float) -> None:
    """Fill the token sums `kv` `[T, B, D]`, the masked q `y` `[T, B, D, H, W]` and, if given, `kept`
    `[T, B, H, W, D]` (uint8) from spikes `[T, B, 3 D, H, W]`."""
    D, N = kv.shape[2], y.shape[3] * y.shape[4]
    options = dict(KEEP=kept is not None, TOKENS=_TILE[0], WIDE=_TILE[1], STATE=state(qkv))
    packed = qkv if kept is None else kept
    grid = (kv.numel() // D, triton.cdiv(D, _TILE[1]))
    launch(_token_sums, grid, qkv, packed, kv, N, D, **options)
    mask = torch.empty_like(kv)
    lif_forward(kv, mask, decay, threshold)
    M = y.numel() // D
    launch(_masked, (triton.cdiv(M, _TILE[0]), grid[1]), qkv, packed, mask, y, M, N, D, **options)


def attend_backward(
    g: Tensor,
    kept: Tensor,
    kv: Tensor,
    gqkv: Tensor,
    decay: Tensor,
    threshold: float,
    alpha: float,
    want_decay: bool,
) -> Tensor:
    """Fill `gqkv`; return the gradient of the decay."""
    D, N = kv.shape[2], gqkv.shape[3] * gqkv.shape[4]
    g_mask, g_kv, mask = torch.empty_like(kv), torch.empty_like(kv), torch.empty_like(kv)
    options = dict(TOKENS=_TILE[0], WIDE=_TILE[1], STATE=state(kv))
    columns = triton.cdiv(D, _TILE[1])
    launch(_mask_gradient, (kv.numel() // D, columns), g, kept, g_mask, N, D, **options)
    lif_forward(kv, mask, decay, threshold)
    g_decay = lif_backward(g_mask, kv, g_kv, decay, threshold, alpha, want_decay)
    M = kept.numel() // D
    launch(_backward, (triton.cdiv(M, _TILE[0]), columns), g, kept, mask, g_kv, gqkv, M, N, D, **options)
    return g_decay


def kept_of(qkv: Tensor) -> Tensor:
    """Memory for what the backward pass needs of the spikes `[T, B, 3 D, H, W]`."""
    T, B, channels, H, W = qkv.shape
    return qkv.new_empty(T, B, H, W, channels // 3, dtype=torch.uint8)


@triton.jit
def _token_sums(  # type: ignore[no-untyped-def]
    qkv, kept, kv, N, D, KEEP: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, STATE: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((TOKENS, WIDE), dtype=STATE)
    for start in range(0, N, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = (token < N)[:, None] & (c < D)[None, :]
        row = image * N + token
        q = qkv + (row * 3)[:, None] * D + c[None, :]
        k = tl.load(q + D, mask=inside, other=0.0) != 0
        v = tl.load(q + D + D, mask=inside, other=0.0) != 0
        total += tl.where(k & v, 1.0, 0.0)
        if KEEP:
            bits = tl.where(tl.load(q, mask=inside, other=0.0) != 0, 1, 0) + tl.where(k, 2, 0) + tl.where(v, 4, 0)
            tl.store(kept + row[:, None] * D + c[None, :], bits.to(tl.uint8), mask=inside)
    tl.store(kv + image * D + c, tl.sum(total, 0), mask=c < D)


@triton.jit
def _masked(  # type: ignore[no-untyped-def]
    qkv, kept, mask, y, M, N, D, KEEP: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, STATE: tl.constexpr
):
    row, c, inside = places(M, D, TOKENS, WIDE)
    at = row[:, None] * D + c[None, :]
    passes = tl.load(mask + (row // N)[:, None] * D + c[None, :], mask=inside, other=0.0) != 0
    if KEEP:
        q = (tl.load(kept + at, mask=inside, other=0).to(tl.int32) & 1) != 0
    else:
        q = tl.load(qkv + (row * 3)[:, None] * D + c[None, :], mask=inside, other=0.0) != 0
    tl.store(y + at, tl.where(q & passes, 1.0, 0.0).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _mask_gradient(  # type: ignore[no-untyped-def]
    g, kept, g_mask, N, D, TOKENS: tl.constexpr, WIDE: tl.constexpr, STATE: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((TOKENS, WIDE), dtype=STATE)
    for start in range(0, N, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = (token < N)[:, None] & (c < D)[None, :]
        at = (image * N + token)[:, None] * D + c[None, :]
        q = (tl.load(kept + at, mask=inside, other=0).to(tl.int32) & 1) != 0
        total += tl.where(q, tl.load(g + at, mask=inside, other=0.0).to(STATE), 0.0)
    tl.store(g_mask + image * D + c, tl.sum(total, 0), mask=c < D)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    g, kept, mask, g_kv, gqkv, M, N, D, TOKENS: tl.constexpr, WIDE: tl.constexpr, STATE: tl.constexpr
):
    row, c, inside = places(M, D, TOKENS, WIDE)
    at = row[:, None] * D + c[None, :]
    image = (row // N)[:, None] * D + c[None, :]
    bits = tl.load(kept + at, mask=inside, other=0).to(tl.int32)
    kind = gqkv.dtype.element_ty
    to = gqkv + (row * 3)[:, None] * D + c[None, :]
    passes = tl.load(mask + image, mask=inside, other=0.0) != 0
    g_y = tl.load(g + at, mask=inside, other=0.0).to(STATE)
    tl.store(to, tl.where(passes, g_y, 0.0).to(kind), mask=inside)
    g_sum = tl.load(g_kv + image, mask=inside, other=0.0)
    tl.store(to + D, tl.where((bits & 4) != 0, g_sum, 0.0).to(kind), mask=inside)
    tl.store(to + D + D, tl.where((bits & 2) != 0, g_sum, 0.0).to(kind), mask=inside)
