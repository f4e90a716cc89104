"""Max-pooling 3 x 3 with padding 1 and stride 2 or 1 as Triton kernels; see module/kernels/pool.py.

The backward pass gathers: each gradient of the input is written once, from the at most four windows that hold it.

Legend: N images, C channels (innermost in memory), H x W feature map, h x w pooled.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from module.kernels.triton_common import launch, state, tile


def max_pool(x: Tensor, out: Tensor, winner: Tensor | None) -> None:
    """Fill `out` and, if given, `winner` (uint8) from `x` `[N, C, H, W]`."""
    _, C, H, W = x.shape
    h, w = out.shape[2:]
    rows, wide = tile(C)
    M = out.numel() // C
    options = dict(KEEP=winner is not None, ROWS=rows, WIDE=wide, STATE=state(x))
    tensors = (x, out, out if winner is None else winner)
    launch(_forward, (triton.cdiv(M, rows), triton.cdiv(C, wide)), *tensors, M, C, H, W, h, w, **options)


def max_pool_backward(g: Tensor, winner: Tensor, gx: Tensor) -> None:
    """Fill `gx` `[N, C, H, W]` from the gradient `[N, C, h, w]` of the output."""
    _, C, H, W = gx.shape
    rows, wide = tile(C)
    M = gx.numel() // C
    options = dict(ROWS=rows, WIDE=wide, STATE=state(g))
    launch(_backward, (triton.cdiv(M, rows), triton.cdiv(C, wide)), g, winner, gx, M, C, H, W, *g.shape[2:], **options)


def max_pool_neighbours(
    x: Tensor, out: Tensor, winner: Tensor | None, height: int, width: int, segment: int, channels: int
) -> None:
    """Fill `out` and, if given, `winner` (uint8) from `x`, with stride 1; all have the same layout in memory."""
    rows, wide = tile(channels)
    M = x.numel() // channels
    options = dict(KEEP=winner is not None, ROWS=rows, WIDE=wide, STATE=state(x))
    tensors = (x, out, out if winner is None else winner)
    grid = (triton.cdiv(M, rows), triton.cdiv(channels, wide))
    launch(_neighbours, grid, *tensors, M, channels, height, width, segment, **options)


def max_pool_neighbours_backward(
    g: Tensor, winner: Tensor, gx: Tensor, height: int, width: int, segment: int, channels: int
) -> None:
    """Fill `gx` from the gradient of the output; all have the same layout in memory."""
    rows, wide = tile(channels)
    M = gx.numel() // channels
    options = dict(ROWS=rows, WIDE=wide, STATE=state(g))
    grid = (triton.cdiv(M, rows), triton.cdiv(channels, wide))
    launch(_neighbours_backward, grid, g, winner, gx, M, channels, height, width, segment, **options)


@triton.jit
def places(M, C, ROWS: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows and channels of this program, 64-bit, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    return row, c, (row < M)[:, None] & (c < C)[None, :]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    out,
    winner,
    M,
    C,
    H,
    W,
    h,
    w,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
):
    row, c, inside = places(M, C, ROWS, WIDE)
    top, left = row // w % h * 2 - 1, row % w * 2 - 1
    corner = (row // w // h * H + top) * W + left
    best = tl.full((ROWS, WIDE), float("-inf"), STATE)
    tap = tl.full((ROWS, WIDE), 9, tl.int32)
    for k in tl.static_range(9):
        if k == 3 or k == 6:
            corner += W
        y, z = top + k // 3, left + k % 3
        valid = ((y >= 0) & (y < H) & (z >= 0) & (z < W))[:, None] & inside
        at = (corner + k % 3)[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=valid, other=float("-inf")).to(STATE)
        # Of equal inputs the first wins, and NaN wins over all, as in torch.
        wins = valid & ((value > best) | (value != value) | (tap == 9))
        best = tl.where(wins, value, best)
        tap = tl.where(wins, k, tap)
    at = row[:, None] * C + c[None, :]
    tl.store(out + at, best.to(out.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(winner + at, tap.to(tl.uint8), mask=inside)


@triton.jit
def gathered(  # type: ignore[no-untyped-def]
    g, winner, row, c, inside, C, H, W, h, w, STATE: tl.constexpr
):
    """The gradient of the input at pixels `row`: the sum over the windows that a pixel won."""
    y, z = row // W % H, row % W
    corner = (row // W // H * h + y // 2) * w + z // 2
    total = tl.zeros(inside.shape, STATE)
    # An even row or column is the centre of one window; an odd one is the last of one and the first of the next.
    for down in tl.static_range(2):
        if down == 1:
            corner += w
        for right in tl.static_range(2):
            valid = (y // 2 + down < h) & (z // 2 + right < w)
            if down == 1:
                valid = valid & (y % 2 == 1)
            if right == 1:
                valid = valid & (z % 2 == 1)
            tap = (y % 2 + 1) * (1 - down) * 3 + (z % 2 + 1) * (1 - right)
            at = (corner + right)[:, None] * C + c[None, :]
            mask = valid[:, None] & inside
            won = tl.load(winner + at, mask=mask, other=9).to(tl.int64) == tap[:, None]
            total += tl.where(won, tl.load(g + at, mask=mask, other=0.0).to(STATE), 0.0)
    return total


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    g, winner, gx, M, C, H, W, h, w, ROWS: tl.constexpr, WIDE: tl.constexpr, STATE: tl.constexpr
):
    row, c, inside = places(M, C, ROWS, WIDE)
    total = gathered(g, winner, row, c, inside, C, H, W, h, w, STATE)
    tl.store(gx + row[:, None] * C + c[None, :], total.to(gx.dtype.element_ty), mask=inside)


@triton.jit
def _neighbours(  # type: ignore[no-untyped-def]
    x,
    out,
    winner,
    M,
    C,
    H,
    W,
    segment,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
):
    row, c, inside = places(M, C, ROWS, WIDE)
    y, z = row // W % H, row % W % segment
    at = row[:, None] * C + c[None, :]
    corner = row - W - 1
    best = tl.full((ROWS, WIDE), float("-inf"), STATE)
    tap = tl.full((ROWS, WIDE), 9, tl.int32)
    for k in tl.static_range(9):
        if k == 3 or k == 6:
            corner += W
        down, right = y + (k // 3 - 1), z + (k % 3 - 1)
        valid = ((down >= 0) & (down < H) & (right >= 0) & (right < segment))[:, None] & inside
        value = tl.load(x + (corner + k % 3)[:, None] * C + c[None, :], mask=valid, other=float("-inf")).to(STATE)
        wins = valid & ((value > best) | (value != value) | (tap == 9))
        best = tl.where(wins, value, best)
        tap = tl.where(wins, k, tap)
    tl.store(out + at, best.to(out.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(winner + at, tap.to(tl.uint8), mask=inside)


@triton.jit
def _neighbours_backward(  # type: ignore[no-untyped-def]
    g, winner, gx, M, C, H, W, segment, ROWS: tl.constexpr, WIDE: tl.constexpr, STATE: tl.constexpr
):
    """An input that is number k of a window is next to its centre the other way round."""
    row, c, inside = places(M, C, ROWS, WIDE)
    y, z = row // W % H, row % W % segment
    corner = row + W + 1
    total = tl.zeros((ROWS, WIDE), dtype=STATE)
    for k in tl.static_range(9):
        if k == 3 or k == 6:
            corner -= W
        down, right = y - (k // 3 - 1), z - (k % 3 - 1)
        valid = ((down >= 0) & (down < H) & (right >= 0) & (right < segment))[:, None] & inside
        at = (corner - k % 3)[:, None] * C + c[None, :]
        won = tl.load(winner + at, mask=valid, other=9).to(tl.int32) == k
        total += tl.where(won, tl.load(g + at, mask=valid, other=0.0).to(STATE), 0.0)
    tl.store(gx + row[:, None] * C + c[None, :], total.to(gx.dtype.element_ty), mask=inside)
