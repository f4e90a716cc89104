"""Which kernels can compute the neurons here, and the reason where they cannot."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from module.kernels import cpu, triton_device
from module.neuron import make_neuron, sj_neuron

# `torch` and `cupy` are SpikingJelly's; `cpp` (compiled, CPU), `triton` (CUDA) and `lean` (torch operations on whole
# tensors, anywhere) are this project's.
BACKENDS = ("auto", "torch", "cupy", "cpp", "triton", "lean")


def why_not(backend: str, device: torch.device) -> str | None:
    """The reason why a backend cannot run on a device, or None."""
    if backend == "cupy":
        if device.type != "cuda":
            return f"the model is on {device}, not on a CUDA device"
        return why_cupy_cannot_be_used(device)
    if backend == "cpp":
        return cpu.why_unusable() if device.type == "cpu" else f"the model is on {device}, not on a CPU"
    if backend == "triton":
        return triton_device.why_not(device)
    return None


def check_backend(name: str, device: torch.device, *, runs: bool = True) -> str:
    """`name`, if there is such a backend; with `runs`, if it can run on this device.

    Raises:
        ValueError: it is not, with the reason.
    """
    if name not in BACKENDS:
        raise ValueError(f"neuron_backend={name!r} is not one of {', '.join(BACKENDS)}")
    if runs and (reason := why_not(name, device)):
        raise ValueError(f"neuron backend {name!r} cannot be used: {reason}. Use 'auto' or 'torch'.")
    return name


def fastest_first(device: torch.device) -> tuple[str, ...]:
    """What `auto` tries on a kind of device, in this order (benchmarks/RESULTS.md)."""
    return {"cpu": ("cpp", "lean"), "cuda": ("triton", "cupy", "torch")}.get(device.type, ("lean",))


@functools.cache
def why_cupy_cannot_be_used(device: torch.device = torch.device("cuda")) -> str | None:  # noqa: B008
    """The true reason why SpikingJelly's CuPy kernels cannot run on a device, or None when they can.

    SpikingJelly catches every exception around `import cupy` and later reports only that CuPy is not installed;
    this follows the same imports and keeps the exception. Then SpikingJelly's own neurons run there, since much
    else can break: CuPy may have been built for another CUDA version than the driver's.
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
    return why_cupy_nodes_fail(device)


def why_cupy_nodes_fail(device: torch.device) -> str | None:
    """None, or how SpikingJelly's LIF and parametric LIF go wrong there on CuPy, in a forward or a backward pass."""
    for mode in ("lif", "plif"):
        found: list[list[Tensor]] = []
        for backend in ("torch", "cupy"):
            node = make_neuron(mode).to(device)
            node.backend = backend  # type: ignore[assignment]
            x = torch.linspace(0.3, 2.6, 24, device=device).view(4, 2, 3).requires_grad_()
            try:
                spikes = node(x)
                spikes.backward(torch.ones_like(spikes))
                found.append([value.detach().cpu() for value in (spikes, x.grad) if value is not None])
            except Exception as error:
                words = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                return f"running SpikingJelly's {type(node).__name__} on {backend} failed: {words}"
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True)):
            return f"SpikingJelly's {type(node).__name__} computes something else on CuPy than on torch"
    return None
