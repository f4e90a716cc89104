"""Which kernels can compute the neurons here, and the reason where they cannot."""

from __future__ import annotations

import functools
import importlib
import logging

import torch

from module.kernels import cpu
from module.neuron import sj_neuron

_logger = logging.getLogger("sdt")

# `torch` and `cupy` are SpikingJelly's; `cpp` (compiled, CPU), `triton` (CUDA) and `lean` (torch operations on whole
# tensors, anywhere) are this project's.
BACKENDS = ("auto", "torch", "cupy", "cpp", "triton", "lean")
# The dtypes for which SpikingJelly ships kernels ("float" and "half2").
CUPY_DTYPES = (torch.float32, torch.float16)


def why_not(backend: str, device: torch.device) -> str | None:
    """The reason why a backend cannot run on a device, or None."""
    if backend == "cupy":
        return why_cupy_cannot_be_used() if device.type == "cuda" else f"the model is on {device}, not on a CUDA device"
    if backend == "cpp":
        return cpu.why_unusable() if device.type == "cpu" else f"the model is on {device}, not on a CPU"
    if backend == "triton":
        from module.kernels import lif_triton  # triton takes long to import

        if device.type != "cuda" and not lif_triton.interpreted():
            return f"the model is on {device}, not on a CUDA device"
        return lif_triton.why_unusable()
    return None


def choose_backend(choice: str, device: torch.device) -> str:
    """The backend that the neurons of a model on `device` get.

    `auto` is the fastest that was measured on that kind of device (benchmarks/RESULTS.md): the compiled kernels on a
    CPU; on CUDA SpikingJelly's CuPy kernels where they work.

    Raises:
        ValueError: an unknown name, or one that cannot run on this device, with the reason.
    """
    if choice not in BACKENDS:
        raise ValueError(f"neuron_backend={choice!r} is not one of {', '.join(BACKENDS)}")
    if choice != "auto":
        if reason := why_not(choice, device):
            raise ValueError(f"neuron backend {choice!r} cannot be used: {reason}. Use 'auto' or 'torch'.")
        return choice
    best = {"cpu": "cpp", "cuda": "cupy"}.get(device.type, "lean")
    reason = why_not(best, device)
    if reason is None:
        return best
    fallback = "lean" if device.type == "cpu" else "torch"
    _logger.warning(f"warning: neurons run on {fallback}, not on {best}: {reason}")
    return fallback


@functools.cache
def why_cupy_cannot_be_used() -> str | None:
    """The true reason why SpikingJelly's CuPy kernels cannot run here, or None when they can.

    SpikingJelly catches every exception around `import cupy` and later reports only that CuPy is not installed;
    this follows the same imports and keeps the exception. The last check runs a kernel, since an installed CuPy
    may have been built for another CUDA version than the driver's.
    """
    steps = (
        ("importing cupy", lambda: importlib.import_module("cupy")),
        (
            "importing SpikingJelly's CUDA kernels",
            lambda: [
                importlib.import_module(f"spikingjelly.activation_based.{name}")
                for name in ("cuda_utils", "neuron_kernel", "auto_cuda.neuron_kernel")
            ],
        ),
    )
    for what, attempt in steps:
        try:
            attempt()
        except Exception as error:
            return f"{what} failed: {type(error).__name__}: {error}"
    if sj_neuron.cupy is None:
        return "SpikingJelly could not import CuPy when it was first loaded; restart the process"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        import cupy

        with cupy.cuda.Device(torch.cuda.current_device()):
            # User-defined kernels are what SpikingJelly launches, so this compiles one.
            double = cupy.RawKernel(r'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }', "twice")
            x = cupy.ones(4, dtype=cupy.float32)
            double((1,), (4,), (x,))
            total = float(x.sum())
    except Exception as error:
        return f"compiling and running a CuPy kernel failed: {type(error).__name__}: {error}"
    return None if total == 8.0 else f"a CuPy kernel returned {total} instead of 8.0"
