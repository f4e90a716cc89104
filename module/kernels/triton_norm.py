"""BatchNorm's statistics, and BatchNorm with the addition of a shortcut, as Triton kernels.

What contains a neuron is in triton_norm_lif.py.

The forward pass reads its input for the statistics, and once more to normalise; the backward pass reads it once for the
sums per channel and once for the gradient. Sums are partial per program, and a small kernel adds them up in float64:
the result is the same in every run.

Legend: M rows (steps times batch times map), C channels, innermost in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from module.kernels.triton_common import channels_of, launch, shares, state, state_dtype, tile

_FINISH = (32, 16)  # partial sums and channels of one block of the small kernels


def batch_affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel (float64), and the scale and shift that normalise by them."""
    C, M = x.shape[2], x.numel() // x.shape[2]
    rows, wide = tile(C)
    columns = triton.cdiv(C, wide)
    programs = shares(M, rows, columns)
    partial = torch.empty(2, programs, C, dtype=state_dtype(x.dtype), device=x.device)
    launch(_statistics, (programs, columns), x, partial, M, C, ROWS=rows, WIDE=wide, STATE=state(x))
    # An operator may not return two views of one tensor.
    mean, var = (torch.empty(C, dtype=torch.float64, device=x.device) for _ in range(2))
    scale, shift = torch.empty(2, C, dtype=partial.dtype, device=x.device)
    tensors = (partial, x, weight, bias, mean, var, scale, shift)
    launch(
        _finish_statistics,
        (triton.cdiv(C, _FINISH[1]),),
        *tensors,
        programs,
        M,
        C,
        EPS=eps,
        DEEP=_FINISH[0],
        WIDE=_FINISH[1],
    )
    return mean, var, scale, shift


def affine_of(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel of `batch_affine`, once more: the same bits, in one launch."""
    C, wide = len(mean), _FINISH[1]
    scale, shift = torch.empty(2, C, dtype=state_dtype(x.dtype), device=x.device)
    launch(_affine_of, (triton.cdiv(C, wide),), mean, var, weight, bias, scale, shift, C, EPS=eps, WIDE=wide)
    return scale, shift


def affine_add(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """`out = x * scale + shift (+ residual)`, per channel."""
    C, M = x.shape[2], x.numel() // x.shape[2]
    rows, wide = tile(C)
    options = dict(ADDS=residual is not None, ROWS=rows, WIDE=wide, STATE=state(x))
    grid = (triton.cdiv(M, rows), triton.cdiv(C, wide))
    launch(_affine_add, grid, x, scale, shift, x if residual is None else residual, out, M, C, **options)


def bn_add_backward(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, and of BatchNorm's weight and bias."""
    C, M = x.shape[2], x.numel() // x.shape[2]
    rows, wide = tile(C)
    columns = triton.cdiv(C, wide)
    programs = shares(M, rows, columns)
    partial = torch.empty(2, programs, C, dtype=state_dtype(x.dtype), device=x.device)
    factors = torch.empty(3, C, dtype=partial.dtype, device=x.device)
    gx = torch.empty_like(x)
    tensors = (g, x, mean, factors, gx, partial)
    options = dict(ROWS=rows, WIDE=wide, STATE=state(x))
    launch(_add_backward, (programs, columns), *tensors, M, C, SUMS=True, **options)
    g_weight, g_bias = finish(partial, weight, var, factors, M, eps)
    launch(_add_backward, (triton.cdiv(M, rows), columns), *tensors, M, C, SUMS=False, **options)
    return gx, g_weight, g_bias


def finish(
    partial: Tensor, weight: Tensor, var: Tensor, factors: Tensor, count: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from the partial sums; fills what the gradient of the input needs of them."""
    _, programs, C = partial.shape
    g_weight, g_bias = torch.empty_like(weight), torch.empty_like(weight)
    tensors = (partial, weight, var, factors, g_weight, g_bias)
    deep, wide = _FINISH
    launch(_finish_sums, (triton.cdiv(C, wide),), *tensors, programs, count, C, EPS=eps, DEEP=deep, WIDE=wide)
    return g_weight, g_bias


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    x, partial, M, C, ROWS: tl.constexpr, WIDE: tl.constexpr, STATE: tl.constexpr
):
    """Sums per channel of the values and of their squares, both less the channel's first value: they cancel less."""
    c, exists = channels_of(C, WIDE)
    first = tl.load(x + c, mask=exists, other=0.0).to(STATE)
    total = tl.zeros((ROWS, WIDE), dtype=STATE)
    squares = total
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for start in range(program * ROWS, M, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & exists[None, :]
        value = tl.load(x + row[:, None] * C + c[None, :], mask=inside, other=0.0).to(STATE)
        value = tl.where(inside, value - first[None, :], 0.0)
        total += value
        squares += value * value
    at = program * C + c
    tl.store(partial + at, tl.sum(total, 0), mask=exists)
    tl.store(partial + programs * C + at, tl.sum(squares, 0), mask=exists)


@triton.jit
def _sum(partial, programs, C, c, exists, DEEP: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two partial sums of each channel, added up in float64."""
    a = tl.zeros((DEEP, WIDE), dtype=tl.float64)
    b = a
    second = partial + programs.to(tl.int64) * C
    for start in range(0, programs, DEEP):
        row = (start + tl.arange(0, DEEP)).to(tl.int64)
        inside = (row < programs)[:, None] & exists[None, :]
        at = row[:, None] * C + c[None, :]
        a += tl.load(partial + at, mask=inside, other=0.0).to(tl.float64)
        b += tl.load(second + at, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit(do_not_specialize=["programs", "count"])
def _finish_statistics(  # type: ignore[no-untyped-def]
    partial,
    x,
    weight,
    bias,
    mean,
    var,
    scale,
    shift,
    programs,
    count,
    C,
    EPS: tl.constexpr,
    DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    exists = c < C
    total, squares = _sum(partial, programs, C, c, exists, DEEP, WIDE)
    n = count.to(tl.float64)
    off = total / n
    m = tl.load(x + c, mask=exists, other=0.0).to(tl.float64) + off
    v = tl.maximum(squares / n - off * off, 0.0)
    tl.store(mean + c, m, mask=exists)
    tl.store(var + c, v, mask=exists)
    _store_affine(m, v, weight, bias, scale, shift, c, exists, EPS)


@triton.jit
def _store_affine(m, v, weight, bias, scale, shift, c, exists, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    s = tl.load(weight + c, mask=exists, other=0.0).to(tl.float64) * tl.rsqrt(v + EPS)
    tl.store(scale + c, s.to(scale.dtype.element_ty), mask=exists)
    b = tl.load(bias + c, mask=exists, other=0.0).to(tl.float64) - m * s
    tl.store(shift + c, b.to(shift.dtype.element_ty), mask=exists)


@triton.jit
def _affine_of(  # type: ignore[no-untyped-def]
    mean, var, weight, bias, scale, shift, C, EPS: tl.constexpr, WIDE: tl.constexpr
):
    c = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    exists = c < C
    m = tl.load(mean + c, mask=exists, other=0.0)
    v = tl.load(var + c, mask=exists, other=1.0)
    _store_affine(m, v, weight, bias, scale, shift, c, exists, EPS)


@triton.jit(do_not_specialize=["programs", "count"])
def _finish_sums(  # type: ignore[no-untyped-def]
    partial,
    weight,
    var,
    factors,
    g_weight,
    g_bias,
    programs,
    count,
    C,
    EPS: tl.constexpr,
    DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """From the sums of g and of g * (x - mean): with y = (x - mean) * inv * weight + bias over n values per channel,
    gx = scale * g + q * (x - mean) + r, where q = -scale * inv^2 * sum(g * (x - mean)) / n, r = -scale * sum(g) / n."""
    c = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    exists = c < C
    total, product = _sum(partial, programs, C, c, exists, DEEP, WIDE)
    n = count.to(tl.float64)
    inv = tl.rsqrt(tl.load(var + c, mask=exists, other=1.0) + EPS)
    scale = tl.load(weight + c, mask=exists, other=0.0).to(tl.float64) * inv
    share = scale / n
    kind = factors.dtype.element_ty
    tl.store(factors + c, (-share * inv * inv * product).to(kind), mask=exists)
    tl.store(factors + C + c, (-share * total).to(kind), mask=exists)
    tl.store(factors + C + C + c, scale.to(kind), mask=exists)
    tl.store(g_weight + c, (product * inv).to(g_weight.dtype.element_ty), mask=exists)
    tl.store(g_bias + c, total.to(g_bias.dtype.element_ty), mask=exists)


@triton.jit
def _affine_add(  # type: ignore[no-untyped-def]
    x,
    scale,
    shift,
    residual,
    out,
    M,
    C,
    ADDS: tl.constexpr,
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
    y = tl.load(x + at, mask=inside, other=0.0).to(STATE) * a + b
    if ADDS:
        y += tl.load(residual + at, mask=inside, other=0.0).to(STATE)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_backward(  # type: ignore[no-untyped-def]
    g,
    x,
    mean,
    factors,
    gx,
    partial,
    M,
    C,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
):
    """Sums per channel with SUMS, else the gradient of the input; `g` is the gradient of BatchNorm's output."""
    c, exists = channels_of(C, WIDE)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    center = tl.load(mean + c, mask=exists, other=0.0).to(STATE)[None, :]
    if not SUMS:
        q = tl.load(factors + c, mask=exists, other=0.0)[None, :]
        r = tl.load(factors + C + c, mask=exists, other=0.0)[None, :]
        a = tl.load(factors + C + C + c, mask=exists, other=0.0)[None, :]
    sum_g = tl.zeros((ROWS, WIDE), dtype=STATE)
    sum_gx = sum_g
    for start in range(program * ROWS, M, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & exists[None, :]
        at = row[:, None] * C + c[None, :]
        g_y = tl.load(g + at, mask=inside, other=0.0).to(STATE)
        value = tl.load(x + at, mask=inside, other=0.0).to(STATE) - center
        if SUMS:
            sum_g += g_y
            sum_gx += g_y * value
        else:
            tl.store(gx + at, (a * g_y + q * value + r).to(gx.dtype.element_ty), mask=inside)
    if SUMS:
        to = partial + program * C + c
        tl.store(to, tl.sum(sum_g, 0), mask=exists)
        tl.store(to + programs * C, tl.sum(sum_gx, 0), mask=exists)
