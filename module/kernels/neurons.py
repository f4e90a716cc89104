"""Substitutes of the neurons alone: this project's kernels, and SpikingJelly's for CUDA.

The kernels compute LIF and parametric LIF with hard reset to 0, no gradient through the reset, a sigmoid surrogate and
a membrane potential of at least float32; a neuron with other settings runs plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from module.kernels import cpu
from module.kernels.cpu import state_dtype
from module.kernels.lif import lif, once
from module.kernels.substitute import Context, Substitute
from module.neuron import LIF, ParametricLIF, sj_neuron, sj_surrogate


class _Neuron(Substitute):
    """A neuron is computed in the same way in training and in evaluation, under autocast or not."""

    @classmethod
    def seen(cls, context: Context) -> Context:
        return (*context[:2], None, True)


class KernelNeuron(_Neuron):
    """A neuron on one of this project's kernels.

    Attributes:
        kernel: `cpp`, `triton` or `lean`.
    """

    kernel: str = "cpp"

    @classmethod
    def computes(cls, dtype: torch.dtype, settings: Mapping[str, Any]) -> bool:
        return settings["kernel"] != "cpp" or dtype in cpu.DTYPES

    def may_run(self, x: Tensor) -> bool:
        return self._is_standard(x) and super().may_run(x)

    def fast_forward(self, x: Tensor) -> Tensor:
        return lif(once(x), self.decay(x), len(x), *self.constants(), self.kernel)

    def _is_standard(self, x: Tensor) -> bool:
        """Whether the neuron's settings are those that the kernels compute; they can be changed at any time."""
        node: Any = self
        return (
            node.v_reset == 0.0
            and node.detach_reset
            and node.decay_input
            and node.step_mode == "m"
            and node.backend == "torch"
            and not node.store_v_seq
            and type(node.surrogate_function) is sj_surrogate.Sigmoid
            and node.surrogate_function.spiking
            and (node.neuron_dtype == "float32" or x.dtype in (torch.float32, torch.float64))
        )

    def decay(self, x: Tensor) -> Tensor:
        """1 / tau, 0-dimensional, in the state's dtype."""
        node: Any = self
        if isinstance(self, ParametricLIF):
            return node.w.to(state_dtype(x.dtype)).sigmoid()
        return torch.full((), 1.0 / node.tau, dtype=state_dtype(x.dtype), device=x.device)

    def constants(self) -> tuple[float, float]:
        """Threshold, and alpha of the surrogate gradient."""
        node: Any = self
        return float(node.v_threshold), float(node.surrogate_function.alpha)


class CupyNeuron(_Neuron):
    """A neuron on SpikingJelly's CuPy kernels."""

    @classmethod
    def computes(cls, dtype: torch.dtype, settings: Mapping[str, Any]) -> bool:
        return dtype in (torch.float32, torch.float16, torch.bfloat16)  # half precision is raised to float32

    def fast_forward(self, x: Tensor) -> Tensor:
        node: Any = self
        node.backend = "cupy"
        try:
            spikes: Tensor = super(Substitute, self).forward(x)
        finally:
            node.backend = "torch"
        return spikes


_LIF = {
    "module.neuron:LIF.forward": "181c18be8b726244",
    "module.neuron:LIF.multi_step_forward": "9bdf821d6e446c74",
    "module.neuron:LIF.single_step_forward": "1c809df220b0ce87",
    "module.neuron:LIF.neuronal_charge": "b94e6de8f8c101dd",
    "module.neuron:LIF.neuronal_fire": "acf204f2069a6ced",
    "module.neuron:LIF.neuronal_reset": "c16e6a5aa4c5fc64",
}
_PARAMETRIC_LIF = {
    "module.neuron:ParametricLIF.forward": "181c18be8b726244",
    "module.neuron:ParametricLIF.multi_step_forward": "9bdf821d6e446c74",
    "module.neuron:ParametricLIF.single_step_forward": "1c809df220b0ce87",
    "module.neuron:ParametricLIF.neuronal_charge": "0226bc33a0cf5da4",
    "module.neuron:ParametricLIF.neuronal_fire": "acf204f2069a6ced",
    "module.neuron:ParametricLIF.neuronal_reset": "c16e6a5aa4c5fc64",
}


class KernelLIF(KernelNeuron, LIF):
    plain_class: ClassVar[type[nn.Module]] = LIF
    runs_as = "kernel"
    stands_for: ClassVar[dict[str, str]] = _LIF


class KernelParametricLIF(KernelNeuron, ParametricLIF):
    plain_class: ClassVar[type[nn.Module]] = ParametricLIF
    runs_as = "kernel"
    stands_for: ClassVar[dict[str, str]] = _PARAMETRIC_LIF


class CupyLIF(CupyNeuron, LIF):
    plain_class: ClassVar[type[nn.Module]] = LIF
    runs_as = "SpikingJelly's CuPy kernel"
    stands_for: ClassVar[dict[str, str]] = _LIF


class CupyParametricLIF(CupyNeuron, ParametricLIF):
    plain_class: ClassVar[type[nn.Module]] = ParametricLIF
    runs_as = "SpikingJelly's CuPy kernel"
    stands_for: ClassVar[dict[str, str]] = _PARAMETRIC_LIF


def substitute_for(neuron: nn.Module, backend: str) -> type[Substitute] | None:
    """The class that runs `neuron` on `backend`; None for another neuron, and for SpikingJelly's torch code."""
    if backend == "torch" or not isinstance(neuron, sj_neuron.BaseNode):
        return None
    kinds: dict[type[nn.Module], type[Substitute]] = (
        {LIF: CupyLIF, ParametricLIF: CupyParametricLIF}
        if backend == "cupy"
        else {LIF: KernelLIF, ParametricLIF: KernelParametricLIF}
    )
    return kinds.get(type(neuron))
