"""What the Triton kernels of this project share. They are for CUDA; in Triton's interpreter they run on a CPU too.

Rules that the kernels keep, each with a test in tests/test_triton_compiled.py:

- Pointers and positions are 64-bit and nothing is multiplied in 32 bits: 8-512 at 224 x 224 passes 2**31 elements per
  layer from batch size 223.
- Multiplications and additions are not fused, so that a spike, which is a comparison, rounds as torch's operations do.
- The membrane potentials of all steps of a block live in registers: the more steps, the smaller the block. Beyond
  `MOST_STEPS` there would be too many.

Legend: T time steps, N elements per step; M rows, C channels (innermost in memory).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from module.kernels.cpu import state_dtype
from module.kernels.triton_device import WIDE

_THREADS = 128  # Triton's default of four warps
# Programs that share a sum over all rows: enough for every multiprocessor, few enough to add up at once.
_PROGRAMS = 1024


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one."""
    tensor = next(value for value in arguments if isinstance(value, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*arguments, enable_fp_fusion=False, **constants)


def state(x: Tensor) -> Any:
    """What the kernels compute in, as Triton calls it."""
    return tl.float64 if state_dtype(x.dtype) == torch.float64 else tl.float32


def block(steps: int = 1) -> int:
    """Elements of one block whose threads hold the potentials of so many steps."""
    return _THREADS * (4 if steps <= 8 else 2 if steps <= 16 else 1)


def tile(channels: int, steps: int = 1) -> tuple[int, int]:
    """Rows and channels of such a block."""
    wide = min(WIDE, triton.next_power_of_2(channels))
    return block(steps) // wide, wide


def shares(rows: int, block: int, columns: int) -> int:
    """Programs among which the rows are dealt out."""
    return max(1, min(triton.cdiv(rows, block), triton.cdiv(_PROGRAMS, columns)))


@triton.jit
def channels_of(C, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channels of this program, 64-bit, and which of them exist."""
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    return c, c < C


@triton.jit
def decay_of(decay, C, GROUPS: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """1/tau of the channels of this program, where each of GROUPS equal runs of channels has its own."""
    return tl.load(decay + tl.program_id(1).to(tl.int64) * WIDE // (C // GROUPS))


@triton.jit
def charge(v, current, decay):  # type: ignore[no-untyped-def]
    """The membrane potential that the current makes out of `v`."""
    return v + (current - v) * decay


@triton.jit
def slope(h, threshold: tl.constexpr, alpha: tl.constexpr):  # type: ignore[no-untyped-def]
    """The surrogate's derivative, that of a sigmoid with steepness alpha."""
    e = tl.exp(-tl.abs(h - threshold) * alpha)
    return alpha * e / ((1.0 + e) * (1.0 + e))
