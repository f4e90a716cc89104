"""Where the Triton kernels run, without importing Triton, which takes long."""

from __future__ import annotations

import functools
import importlib
import os

import torch
from torch import Tensor

from module.kernels import cpu

# In Triton's interpreter the kernels run on a CPU, slowly: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Channels of one block, at most: neurons side by side with a time constant each have a multiple of it.
WIDE = 64

# Time steps whose membrane potentials fit in registers.
MOST_STEPS = 32


@functools.cache
def why_unusable() -> str | None:
    """None, or the reason why there is no Triton."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"importing triton failed: {error}"
    return None


def why_not(device: torch.device) -> str | None:
    """None, or the reason why the kernels cannot run on a device."""
    if INTERPRETED:
        return why_unusable()
    if device.type != "cuda":
        return f"the model is on {device}, not on a CUDA device"
    return why_unusable() or (None if torch.cuda.is_available() else "torch sees no CUDA device")


def runs(x: Tensor) -> bool:
    """Whether `x` is on a device of these kernels."""
    return x.is_cuda or INTERPRETED


@torch.compiler.assume_constant_result  # nothing to trace: it does not change while the process runs
def _is_there() -> bool:
    return why_unusable() is None


def usable(x: Tensor) -> bool:
    """Whether there are kernels, of whatever kind, for layers that are computed together, and they can compute `x`."""
    return x.dtype in DTYPES and _is_there() if runs(x) else cpu.usable(x)
