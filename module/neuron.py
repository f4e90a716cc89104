"""Spiking neurons: the only place in the project where they are built.

The dynamics are SpikingJelly's, in multi-step mode. This file adds what a model that is called like any other PyTorch
model needs: the membrane potential lives for one forward pass only, and stays in float32 under mixed precision.

Legend: T time steps, B batch, `*` any further dimensions.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # SpikingJelly 0.0.0.0.14 scripts small functions at import; torch >= 2.10 says that scripting is deprecated.
    # Nothing the user can act on.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    from spikingjelly.activation_based import neuron as sj_neuron
    from spikingjelly.activation_based import surrogate as sj_surrogate
    from spikingjelly.activation_based.auto_cuda import base as sj_cuda


class _NumPyWithInt:
    """numpy as SpikingJelly 0.0.0.0.14 knows it: its CuPy kernels ask for `np.int`, which NumPy removed in 1.24."""

    int = int

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)


# Only for the one file of SpikingJelly that asks, so that nobody else's numpy changes.
sj_cuda.np = _NumPyWithInt()

NEURON_DTYPES = ("float32", "input")
SURROGATES: dict[str, Callable[..., nn.Module]] = {
    "sigmoid": sj_surrogate.Sigmoid,
    "atan": sj_surrogate.ATan,
    "erf": sj_surrogate.Erf,
    "soft_sign": sj_surrogate.SoftSign,
    "piecewise_quadratic": sj_surrogate.PiecewiseQuadratic,
    "piecewise_exp": sj_surrogate.PiecewiseExp,
}
NeuronFactory = Callable[..., nn.Module]


class SpikingNode(nn.Module):
    """Gives a SpikingJelly node a state that lives for one forward pass. To be named before the node:
    `class MyNeuron(SpikingNode, SomeNode)`.

    The state is reset before and after each forward pass, so neither the batch size nor the mode of an earlier call
    matters, the module can be deep-copied, and no graph stays alive.

    Attributes:
        neuron_dtype: `float32` keeps the membrane potential in float32 for 16-bit inputs; `input` keeps it in the
            input's dtype, as the published mixed-precision runs did.
    """

    neuron_dtype: str = "float32"

    def forward(self, x_seq: Tensor) -> Tensor:
        """Spikes `[T, B, *]` (0 or 1, in `x_seq`'s dtype) for the input current `x_seq` `[T, B, *]`."""
        node: Any = self
        node.reset()
        # Neither autocast nor a half-precision input may lower the state's precision unless asked to: near the
        # threshold, rounding decides whether a neuron fires.
        half = x_seq.dtype in (torch.float16, torch.bfloat16)
        kind = x_seq.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            try:
                spikes = super().forward(x_seq.float() if half and self.neuron_dtype == "float32" else x_seq)
            finally:
                potentials = node.v_seq if node.store_v_seq else None
                node.reset()
        if potentials is not None:
            node.v_seq = potentials.detach()
        return spikes.to(x_seq.dtype)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """Charge, fire and reset at each time step; SpikingJelly's kernels where `backend` names them."""
        if self.backend == "torch":
            return sj_neuron.BaseNode.multi_step_forward(self, x_seq)
        return super().multi_step_forward(x_seq)  # type: ignore[misc]

    def single_step_forward(self, x: Tensor) -> Tensor:
        """Charge, fire and reset once."""
        # In evaluation SpikingJelly computes LIF and IF by a fixed formula, which would ignore the `neuronal_charge`
        # of a derived class and has no gradient.
        if isinstance(self, sj_neuron.AdaptBaseNode):
            return sj_neuron.AdaptBaseNode.single_step_forward(self, x)
        return sj_neuron.BaseNode.single_step_forward(self, x)

    def v_float_to_tensor(self, x: Tensor) -> None:
        """The initial membrane potential, in the shape of one time step's input `x`."""
        node: Any = self
        if isinstance(node.v, float):
            # SpikingJelly takes `x.data`, which torch.export cannot follow.
            node.v = torch.full_like(x, node.v)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, neuron_dtype={self.neuron_dtype}"


class LIF(SpikingNode, sj_neuron.LIFNode):
    """Leaky integrate-and-fire, H[t] = V[t-1] + (X[t] - V[t-1]) / tau, fires where H >= v_threshold."""


class ParametricLIF(SpikingNode, sj_neuron.ParametricLIFNode):
    """LIF whose 1/tau = sigmoid(w) is learned, one scalar `w` per layer (Fang et al., ICCV 2021)."""


class IF(SpikingNode, sj_neuron.IFNode):
    """Integrate-and-fire, without a leak."""


class KLIF(SpikingNode, sj_neuron.KLIFNode):
    """LIF with a learned scale of the membrane potential (Jiang and Zhang, 2023)."""


class QIF(SpikingNode, sj_neuron.QIFNode):
    """Quadratic integrate-and-fire."""


class EIF(SpikingNode, sj_neuron.EIFNode):
    """Exponential integrate-and-fire."""


class Izhikevich(SpikingNode, sj_neuron.IzhikevichNode):
    """Izhikevich's neuron: quadratic, with an adaptation current."""

    def w_float_to_tensor(self, x: Tensor) -> None:
        """The initial adaptation current; see `v_float_to_tensor`."""
        node: Any = self
        if isinstance(node.w, float):
            node.w = torch.full_like(x, node.w)


SPIKE_MODES: dict[str, NeuronFactory] = {
    "lif": LIF,
    "plif": ParametricLIF,
    "if": IF,
    "klif": KLIF,
    "qif": QIF,
    "eif": EIF,
    "izhikevich": Izhikevich,
}
_REFUSED = {"liaf": "SpikingJelly's LIAF neuron needs a function as an argument; derive a class and register it"}


def register_neuron(name: str, factory: NeuronFactory) -> None:
    """Make `factory` known as `spike_mode` `name`; see `make_neuron` for the arguments it is called with.

    Raises:
        ValueError: the name is taken by another neuron.
    """
    taken = SPIKE_MODES.get(name)
    if taken is not None and getattr(taken, "__qualname__", None) != getattr(factory, "__qualname__", ""):
        raise ValueError(f"spike_mode {name!r} is the name of {taken}; choose another one for {factory}")
    SPIKE_MODES[name] = factory


def make_neuron(
    spike_mode: str = "lif",
    *,
    v_threshold: float = 1.0,
    surrogate: str = "sigmoid",
    surrogate_alpha: float = 4.0,
    neuron_dtype: str = "float32",
    neuron_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """One layer of spiking neurons, `[T, B, *]` currents in, `[T, B, *]` spikes out.

    The published settings are the defaults (Yao et al. 2023, section 4 and published configurations): tau = 2, hard
    reset to 0, no gradient through the reset, sigmoid surrogate with alpha = 4. Each is passed to the neuron where
    its signature has it.

    Args:
        spike_mode: a name of `SPIKE_MODES`.
        v_threshold: membrane potential at which a neuron fires.
        surrogate, surrogate_alpha: surrogate gradient, a name of `SURROGATES`, and how steep it is.
        neuron_dtype: see `SpikingNode`.
        neuron_args: further arguments of that neuron; they win over the published settings.

    Raises:
        ValueError: an unknown name or argument, with the valid ones.
    """
    for setting, value, valid in (
        ("spike_mode", spike_mode, SPIKE_MODES),
        ("surrogate", surrogate, SURROGATES),
        ("neuron_dtype", neuron_dtype, NEURON_DTYPES),
    ):
        if value not in valid:
            near = difflib.get_close_matches(str(value), valid, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            reason = f": {_REFUSED[value]}" if setting == "spike_mode" and value in _REFUSED else ""
            raise ValueError(f"{setting}={value!r} is not one of {', '.join(valid)}{hint}{reason}")
    factory = SPIKE_MODES[spike_mode]
    taken = inspect.signature(factory).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if unknown := [] if takes_all else sorted(set(neuron_args or {}) - set(taken)):
        raise ValueError(f"neuron_args: {spike_mode} has no argument {', '.join(unknown)}; it has {', '.join(taken)}")
    published = dict(
        v_threshold=v_threshold,
        v_reset=0.0,
        detach_reset=True,
        surrogate_function=SURROGATES[surrogate](alpha=surrogate_alpha),
        step_mode="m",
    )
    settings = {name: value for name, value in published.items() if takes_all or name in taken}
    try:
        neuron = factory(**(settings | dict(neuron_args or {})))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"neuron_args {dict(neuron_args or {})} do not fit {spike_mode}: {error!r}") from error
    if isinstance(neuron, SpikingNode):
        neuron.neuron_dtype = neuron_dtype
    elif isinstance(neuron, sj_neuron.BaseNode):
        kind = type(neuron).__name__
        raise ValueError(
            f"spike_mode {spike_mode}: {kind} would keep its membrane potential from batch to batch; derive it with "
            f"`class {kind}(SpikingNode, ...)` from module.neuron, whose state lives for one forward pass"
        )
    return neuron


def neurons_of(part: nn.Module) -> dict[str, nn.Module]:
    """Name -> each layer of neurons in `part`: SpikingJelly's, and any other module with a `v_threshold`."""
    found = dict(part.named_modules())
    return {n: m for n, m in found.items() if isinstance(m, sj_neuron.BaseNode) or hasattr(m, "v_threshold")}
