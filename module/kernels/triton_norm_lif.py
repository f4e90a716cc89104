"""BatchNorm and the neuron behind it, with or without a max-pool, as Triton kernels.

The backward pass computes the membrane potentials again from the input, once for the sums per channel and once for the
gradient.

Legend: T time steps, M rows (batch times map), C channels, innermost in memory. `x` may be `[1, *]` for T steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from module.kernels.triton_common import channels_of, charge, decay_of, launch, shares, slope, state, state_dtype, tile
from module.kernels.triton_norm import finish
from module.kernels.triton_pool import gathered, places


def affine_lif(x: Tensor, scale: Tensor, shift: Tensor, spikes: Tensor, decay: Tensor, threshold: float) -> None:
    """Fill `spikes` `[T, *]` of a neuron fed with `x * scale + shift`; `decay` is one value, or one for each of several
    equal runs of `triton_device.WIDE` channels or a multiple of it."""
    T, C = spikes.shape[0], x.shape[2]
    M = x.numel() // C // x.shape[0]
    rows, wide = tile(C)
    options = dict(THRESHOLD=threshold, T=T, STATIC=len(x) < T, GROUPS=decay.numel())
    options |= dict(ROWS=rows, WIDE=wide, STATE=state(x))
    grid = (triton.cdiv(M, rows), triton.cdiv(C, wide))
    launch(_affine_lif, grid, x, scale, shift, spikes, decay, M, C, M * C, **options)


def affine_lif_pool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    winner: Tensor | None,
    decay: Tensor,
    threshold: float,
) -> None:
    """As `affine_lif`, and the spikes max-pooled: `out` `[T, B, C, h, w]`, and which of nine won, `winner`."""
    T, B, C, h, w = out.shape
    M = B * h * w
    rows, wide = tile(C)
    options = dict(THRESHOLD=threshold, T=T, STATIC=len(x) < T, KEEP=winner is not None)
    grid = (triton.cdiv(M, rows), triton.cdiv(C, wide))
    tensors = (x, scale, shift, out, out if winner is None else winner, decay)
    sizes = (M, C, x[0].numel(), M * C, *x.shape[3:], h, w)
    launch(_affine_lif_pool, grid, *tensors, *sizes, **options, ROWS=rows, WIDE=wide, STATE=state(x))


def bn_lif_backward(
    g: Tensor,
    winner: Tensor | None,
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    decay: Tensor,
    eps: float,
    threshold: float,
    alpha: float,
    want_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the input, of BatchNorm's weight and bias, and of the decay (of no meaning if unwanted).

    With `winner`, `g` is the gradient of the pooled spikes.
    """
    T, C = g.shape[0], x.shape[2]
    M = x.numel() // C // x.shape[0]
    rows, wide = tile(C, T)
    columns = triton.cdiv(C, wide)
    programs = shares(M, rows, columns)
    dtype, device = state_dtype(x.dtype), x.device
    partial = torch.empty(2, programs, C, dtype=dtype, device=device)
    g_decay = torch.empty(programs * columns if want_decay else 0, dtype=dtype, device=device)
    factors = torch.empty(3, C, dtype=dtype, device=device)
    gx = torch.empty_like(x)
    tensors = (g, g if winner is None else winner, x, *affine, mean, factors, gx, partial, g_decay, decay)
    options = dict(
        THRESHOLD=threshold,
        ALPHA=alpha,
        T=T,
        STATIC=len(x) < T,
        POOLED=winner is not None,
        GROUPS=decay.numel(),
        ROWS=rows,
        WIDE=wide,
        STATE=state(x),
    )
    sizes = (M, C, M * C, (T - 1) * M * C, g[0].numel(), (T - 1) * g[0].numel(), *x.shape[3:], *g.shape[3:])
    launch(_lif_backward, (programs, columns), *tensors, *sizes, SUMS=True, WANT_DECAY=want_decay, **options)
    g_weight, g_bias = finish(partial, weight, var, factors, x.numel() // C, eps)
    grid = (triton.cdiv(M, rows), columns)
    launch(_lif_backward, grid, *tensors, *sizes, SUMS=False, WANT_DECAY=False, **options)
    if not want_decay:
        return gx, g_weight, g_bias, torch.empty_like(decay)
    # Of each group of channels, its columns of programs.
    return gx, g_weight, g_bias, g_decay.view(decay.numel(), -1).sum(1).reshape(decay.shape)


@triton.jit
def _affine_lif(  # type: ignore[no-untyped-def]
    x,
    scale,
    shift,
    spikes,
    decay,
    M,
    C,
    distance,
    THRESHOLD: tl.constexpr,
    T: tl.constexpr,
    STATIC: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
):
    c, exists = channels_of(C, WIDE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < M)[:, None] & exists[None, :]
    at = row[:, None] * C + c[None, :]
    a = tl.load(scale + c, mask=exists, other=0.0).to(STATE)[None, :]
    b = tl.load(shift + c, mask=exists, other=0.0).to(STATE)[None, :]
    d = decay_of(decay, C, GROUPS, WIDE).to(STATE)
    v = tl.zeros((ROWS, WIDE), dtype=STATE)
    for t in tl.static_range(T):
        if t == 0 or not STATIC:
            current = tl.load(x + at, mask=inside, other=0.0).to(STATE) * a + b
            x += distance
        h = charge(v, current, d)
        fires = h >= THRESHOLD
        tl.store(spikes + at, tl.where(fires, 1.0, 0.0).to(spikes.dtype.element_ty), mask=inside)
        v = tl.where(fires, 0.0, h)
        spikes += distance


@triton.jit
def _affine_lif_pool(  # type: ignore[no-untyped-def]
    x,
    scale,
    shift,
    out,
    winner,
    decay,
    M,
    C,
    distance,
    pooled_distance,
    H,
    W,
    h,
    w,
    THRESHOLD: tl.constexpr,
    T: tl.constexpr,
    STATIC: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
):
    """The neurons of each window are computed for that window: a neuron in several windows is computed as often, but
    its input is read once and its spikes are never written. Of equal spikes the first in the window wins."""
    row, c, inside = places(M, C, ROWS, WIDE)
    exists = c < C
    a = tl.load(scale + c, mask=exists, other=0.0).to(STATE)[None, :]
    b = tl.load(shift + c, mask=exists, other=0.0).to(STATE)[None, :]
    d = tl.load(decay).to(STATE)
    top, left = row // w % h * 2 - 1, row % w * 2 - 1
    corner = (row // w // h * H + top) * W + left
    # Four bits per step say which neuron has fired first in the window; 9: none.
    taps = tl.full((ROWS, WIDE), 0, tl.int64)
    for t in tl.static_range(T):
        taps += 9 << (4 * t)
    for k in tl.static_range(9):
        if k == 3 or k == 6:
            corner += W
        y, z = top + k // 3, left + k % 3
        valid = ((y >= 0) & (y < H) & (z >= 0) & (z < W))[:, None] & inside
        at = (corner + k % 3)[:, None] * C + c[None, :]
        v = tl.zeros((ROWS, WIDE), dtype=STATE)
        here = x
        for t in tl.static_range(T):
            if t == 0 or not STATIC:
                current = tl.load(here + at, mask=valid, other=0.0).to(STATE) * a + b
                here += distance
            potential = charge(v, current, d)
            fires = valid & (potential >= THRESHOLD)
            v = tl.where(fires, 0.0, potential)
            first = fires & (((taps >> (4 * t)) & 15) == 9)
            taps -= tl.where(first, (9 - k) << (4 * t), 0).to(tl.int64)
    # Without a spike all are equal, and the first that lies on the map wins.
    corner_tap = tl.where(top < 0, 3, 0) + tl.where(left < 0, 1, 0)
    at = row[:, None] * C + c[None, :]
    for t in tl.static_range(T):
        tap = (taps >> (4 * t)) & 15
        tl.store(out + at, tl.where(tap < 9, 1.0, 0.0).to(out.dtype.element_ty), mask=inside)
        out += pooled_distance
        if KEEP:
            tl.store(winner + at, tl.where(tap < 9, tap, corner_tap[:, None]).to(tl.uint8), mask=inside)
            winner += pooled_distance


@triton.jit
def _lif_backward(  # type: ignore[no-untyped-def]
    g,
    winner,
    x,
    scale,
    shift,
    mean,
    factors,
    gx,
    partial,
    g_decay,
    decay,
    M,
    C,
    distance,
    last,
    g_distance,
    g_last,
    H,
    W,
    h,
    w,
    POOLED: tl.constexpr,
    SUMS: tl.constexpr,
    WANT_DECAY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ALPHA: tl.constexpr,
    T: tl.constexpr,
    STATIC: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
):
    """The gradient of BatchNorm's output, step by step. With SUMS it is summed per channel, over the rows of several
    blocks; without, each program turns that of its block into the gradient of the input."""
    c, exists = channels_of(C, WIDE)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    a = tl.load(scale + c, mask=exists, other=0.0).to(STATE)[None, :]
    b = tl.load(shift + c, mask=exists, other=0.0).to(STATE)[None, :]
    center = tl.load(mean + c, mask=exists, other=0.0).to(STATE)[None, :]
    d = decay_of(decay, C, GROUPS, WIDE).to(STATE)
    if not SUMS:
        q = tl.load(factors + c, mask=exists, other=0.0)[None, :]
        r = tl.load(factors + C + c, mask=exists, other=0.0)[None, :]
    zero = tl.zeros((ROWS, WIDE), dtype=STATE)
    sum_g = zero
    sum_gx = zero
    sum_decay = zero
    for start in range(program * ROWS, M, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & exists[None, :]
        at = row[:, None] * C + c[None, :]
        potentials = ()
        # One position for all tensors and steps: only the pointers to the first element of a step move.
        from_x, v = x, zero
        for t in tl.static_range(T):
            if t == 0 or not STATIC:
                current = tl.load(from_x + at, mask=inside, other=0.0).to(STATE) * a + b
                from_x += distance
            potential = charge(v, current, d)
            v = tl.where(potential >= THRESHOLD, 0.0, potential)
            potentials = potentials + (potential,)  # type: ignore[assignment]  # noqa: RUF005
        g_v = zero
        total = zero
        from_g, from_winner, from_x, to_gx = g + g_last, winner + g_last, x, gx
        if not STATIC:
            from_x += last
            to_gx += last
        for back in tl.static_range(T):
            potential = potentials[T - 1 - back]
            if back == 0 or not STATIC:
                value = tl.load(from_x + at, mask=inside, other=0.0).to(STATE)
                from_x -= distance
            if POOLED:
                g_s = gathered(from_g, from_winner, row, c, inside, C, H, W, h, w, STATE)
                from_winner -= g_distance
            else:
                g_s = tl.load(from_g + at, mask=inside, other=0.0).to(STATE)
            from_g -= g_distance
            kept = tl.where(potential >= THRESHOLD, 0.0, g_v)
            g_h = g_s * slope(potential, THRESHOLD, ALPHA) + kept
            g_in = g_h * d
            g_v = g_h - g_in
            if WANT_DECAY:
                driven = value * a + b
                if back < T - 1:
                    before = potentials[T - 2 - back]  # type: ignore[var-annotated]
                    driven -= tl.where(before >= THRESHOLD, 0.0, before)
                sum_decay += tl.where(inside, g_h * driven, 0.0)
            if STATIC:
                total += g_in
            elif SUMS:
                sum_g += g_in
                sum_gx += g_in * (value - center)
            else:
                result = a * g_in + q * (value - center) + r
                tl.store(to_gx + at, result.to(gx.dtype.element_ty), mask=inside)
                to_gx -= distance
        if STATIC and SUMS:
            sum_g += total
            sum_gx += total * (value - center)
        elif STATIC:
            result = a * total + q * (value - center) + r
            tl.store(to_gx + at, result.to(gx.dtype.element_ty), mask=inside)
    if SUMS:
        to = partial + program * C + c
        tl.store(to, tl.sum(sum_g, 0), mask=exists)
        tl.store(to + programs * C, tl.sum(sum_gx, 0), mask=exists)
    if WANT_DECAY:
        tl.store(g_decay + tl.program_id(1) * programs + program, tl.sum(sum_decay))
