"""Spiking neurons: the only place in the project where they are built.

The dynamics are SpikingJelly's (`LIFNode`, `ParametricLIFNode`, multi-step mode). This file adds what a model
that is called like any other PyTorch model needs: the membrane potential lives for one forward pass only, is
kept in float32 under autocast, and each input goes to the fastest kernel that works for it: SpikingJelly's own
(`torch`, `cupy`) or those of this project (`cpp`, `triton`, `lean`; see `module.kernels.lif`).

Legend: T time steps, B batch, `*` any further dimensions.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # SpikingJelly 0.0.0.0.14 scripts small functions at import; torch >= 2.10 says that scripting is deprecated.
    # Nothing the user can act on.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    from spikingjelly.activation_based import neuron as sj_neuron
    from spikingjelly.activation_based import surrogate

from module.kernels import cpu as cpu_kernels
from module.kernels.lif import KERNELS, lif, state_dtype

_logger = logging.getLogger("sdt")

SPIKE_MODES = ("lif", "plif")
BACKENDS = ("auto", "torch", "cupy", *KERNELS)
NEURON_DTYPES = ("float32", "input")

# The dtypes for which SpikingJelly ships kernels ("float" and "half2").
_CUPY_DTYPES = (torch.float32, torch.float16)

# Shared by both neurons (Yao et al. 2023, section 4 and the published settings): tau = 2, hard reset to 0.
_TAU = 2.0
_SURROGATE_ALPHA = 4.0


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


@functools.cache
def why_triton_cannot_be_used() -> str | None:
    """The reason why Triton kernels cannot run here, or None when they can."""
    from module.kernels import lif_triton as triton_kernels

    return triton_kernels.why_unusable()


@functools.cache
def _best_on_cpu() -> str:
    """`cpp`, or `lean` and one line with the reason."""
    reason = cpu_kernels.why_unusable()
    if reason is None:
        return "cpp"
    _logger.warning(f"warning: neurons run on vectorised torch, not on compiled kernels: {reason}")
    return "lean"


@torch.compiler.assume_constant_result
def choose_backend(choice: str, device: str, dtype: torch.dtype, ours: bool) -> str:
    """The backend that runs for an input.

    `auto` is the fastest that was measured on that kind of device (benchmarks/RESULTS.md): the compiled kernels on a
    CPU; on CUDA SpikingJelly's CuPy kernels where they work.

    Args:
        choice: one of `BACKENDS`.
        device: the input's device type.
        dtype: the dtype the kernel would get.
        ours: whether this project's kernels compute this neuron: see `SpikingNode.standard`.

    Raises:
        ValueError: a backend other than `auto` that cannot run on this input, with the reason.
    """
    if choice == "auto":
        if device == "meta":
            return "lean" if ours else "torch"  # shapes only
        if device == "cpu":
            best = _best_on_cpu() if ours else "torch"
            return "lean" if best == "cpp" and dtype not in cpu_kernels.DTYPES else best
        usable = device == "cuda" and dtype in _CUPY_DTYPES and why_cupy_cannot_be_used() is None
        return "cupy" if usable else "torch"
    if reason := _why_not(choice, device, dtype, ours):
        raise ValueError(f"neuron backend {choice!r} cannot be used: {reason}. Use 'auto' or 'torch'.")
    return choice


def _why_not(choice: str, device: str, dtype: torch.dtype, ours: bool) -> str | None:
    """The reason why a backend cannot run, or None."""
    if choice == "torch":
        return None
    if choice == "cupy":
        if device != "cuda":
            return f"the input is on {device}, not on a CUDA device"
        if dtype not in _CUPY_DTYPES:
            return f"the input is {dtype}; the kernels exist for {_CUPY_DTYPES}"
        return why_cupy_cannot_be_used()
    if not ours:
        return "it computes hard reset to 0 with SpikingJelly's sigmoid surrogate and a float32 state only"
    if choice == "cpp":
        if device != "cpu":
            return f"the input is on {device}, not on a CPU"
        if dtype not in cpu_kernels.DTYPES:
            return f"the input is {dtype}; the kernels exist for {cpu_kernels.DTYPES}"
        return cpu_kernels.why_unusable()
    return why_triton_cannot_be_used() if choice == "triton" else None


class SpikingNode(nn.Module):
    """Gives a SpikingJelly node a state that lives for one forward pass.

    Mixed in before a SpikingJelly node. The state is reset on entry, so neither the batch size nor the mode of an
    earlier call matters, and dropped on exit, so that the module can be deep-copied and holds no graph alive.
    `functional.reset_net` works as for any SpikingJelly module.
    """

    backend_choice: str
    neuron_dtype: str

    def forward(self, x_seq: Tensor) -> Tensor:
        """Spikes `[T, B, *]` (0 or 1, in `x_seq`'s dtype) for the input current `x_seq` `[T, B, *]`."""
        backend = self.backend_for(x_seq)
        if backend in KERNELS:
            return lif(x_seq, self.decay(x_seq), x_seq.shape[0], *self.constants(), backend)
        return self._spikingjelly_forward(x_seq, backend)

    def _spikingjelly_forward(self, x_seq: Tensor, backend: str) -> Tensor:
        node: Any = self
        node.reset()
        # Neither autocast nor a half-precision input may lower the state's precision unless asked to: near the
        # threshold, rounding decides whether a neuron fires.
        with torch.autocast(x_seq.device.type, enabled=False):
            current = x_seq.to(self._spikingjelly_dtype(x_seq))
            if node.backend != backend:
                node.backend = backend
            try:
                spikes = super().forward(current)
            finally:
                node.v = node.v_reset
        if node.store_v_seq:
            node.v_seq = node.v_seq.detach()
        return spikes.to(x_seq.dtype)

    def _spikingjelly_dtype(self, x: Tensor) -> torch.dtype:
        upcast = self.neuron_dtype == "float32" and x.dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if upcast else x.dtype

    def backend_for(self, x: Tensor) -> str:
        """What runs for the input `x`. Raises ValueError when the backend asked for cannot."""
        own = self.backend_choice in KERNELS or x.device.type in ("cpu", "meta")
        dtype = x.dtype if own else self._spikingjelly_dtype(x)
        return choose_backend(self.backend_choice, x.device.type, dtype, self.standard(x))

    def standard(self, x: Tensor) -> bool:
        """Whether this is the neuron that this project's kernels compute, as `make_neuron` builds it."""
        node: Any = self
        return (
            node.v_reset == 0.0
            and node.detach_reset
            and node.decay_input
            and node.step_mode == "m"
            and not node.store_v_seq
            and type(node.surrogate_function) is surrogate.Sigmoid
            and node.surrogate_function.spiking
            and (self.neuron_dtype == "float32" or x.dtype in (torch.float32, torch.float64))
        )

    def decay(self, x: Tensor) -> Tensor:
        """1 / tau, 0-dimensional, in the state's dtype."""
        node: Any = self
        if isinstance(node, sj_neuron.ParametricLIFNode):
            return node.w.to(state_dtype(x.dtype)).sigmoid()
        return torch.full((), 1.0 / node.tau, dtype=state_dtype(x.dtype), device=x.device)

    def constants(self) -> tuple[float, float]:
        """Threshold, and alpha of the surrogate gradient."""
        node: Any = self
        return float(node.v_threshold), float(node.surrogate_function.alpha)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend_choice={self.backend_choice}, neuron_dtype={self.neuron_dtype}"


class LIF(SpikingNode, sj_neuron.LIFNode):
    """Leaky integrate-and-fire, H[t] = V[t-1] + (X[t] - V[t-1]) / 2, fires where H >= v_threshold."""


class ParametricLIF(SpikingNode, sj_neuron.ParametricLIFNode):
    """LIF whose 1/tau = sigmoid(w) is learned, one scalar `w` per layer (Fang et al., ICCV 2021)."""


def backend_of(module: nn.Module, x: Tensor) -> str | None:
    """What runs for the input `x`, or None if `module` is no neuron of this project."""
    return module.backend_for(x) if isinstance(module, SpikingNode) else None


def check_neuron_settings(spike_mode: str, backend: str, neuron_dtype: str) -> None:
    """Raises ValueError naming the bad value and the valid ones."""
    for name, value, valid in (
        ("spike_mode", spike_mode, SPIKE_MODES),
        ("backend", backend, BACKENDS),
        ("neuron_dtype", neuron_dtype, NEURON_DTYPES),
    ):
        if value not in valid:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(valid)}")


def make_neuron(
    spike_mode: str = "lif",
    *,
    v_threshold: float = 1.0,
    backend: str = "auto",
    neuron_dtype: str = "float32",
) -> nn.Module:
    """One layer of spiking neurons, `[T, B, *]` currents in, `[T, B, *]` spikes out.

    Args:
        spike_mode: `lif`, or `plif` for a learnable time constant.
        v_threshold: membrane potential at which a neuron fires.
        backend: `torch` and `cupy`, SpikingJelly's; `cpp` (compiled, CPU), `triton` (CUDA) and `lean` (vectorised
            torch), this project's; an error where it cannot run. `auto`: see `choose_backend`.
        neuron_dtype: `float32` keeps the membrane potential in float32 for 16-bit inputs; `input` keeps it in the
            input's dtype, as the published mixed-precision runs did.

    Raises:
        ValueError: an unknown name, with the valid ones.
    """
    check_neuron_settings(spike_mode, backend, neuron_dtype)
    shared = dict(
        decay_input=True,
        v_threshold=v_threshold,
        v_reset=0.0,
        surrogate_function=surrogate.Sigmoid(alpha=_SURROGATE_ALPHA),
        detach_reset=True,
        step_mode="m",
        backend="torch",  # chosen again in each forward, where the input's device is known
    )
    neuron = LIF(tau=_TAU, **shared) if spike_mode == "lif" else ParametricLIF(init_tau=_TAU, **shared)
    neuron.backend_choice = backend
    neuron.neuron_dtype = neuron_dtype
    return neuron


def set_neuron_backend(model: nn.Module, backend: str) -> None:
    """Choose the backend of every neuron of `model` (one of `BACKENDS`).

    Raises ValueError for an unknown name.
    """
    check_neuron_settings("lif", backend, "float32")
    for module in model.modules():
        if isinstance(module, SpikingNode):
            module.backend_choice = backend
