"""Evaluation from spikes to spikes: a Spike-driven Transformer computed as its paper describes it.

Parameters are read once, at construction. Legend: T time steps, B batch, C channels, H x W feature map, K classes.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.block import MS_Block_Conv
from module.kernels.neurons import KernelLIF, KernelParametricLIF
from module.kernels.parts import PARTS, FusedPart
from module.kernels.substitute import Substitute, plain_class, watched
from module.mlp import MS_MLP_Conv
from module.neuron import LIF, SURROGATES, ParametricLIF
from module.sparse.conv import why_unusable
from module.sparse.network import Network
from module.sparse.program import Program, read
from module.sps import MS_SPS

# Of these the network may consist.
_CLASSES: tuple[type[nn.Module], ...] = (
    *(MS_SPS, MS_SSA_Conv, MS_MLP_Conv, MS_Block_Conv, LIF, ParametricLIF, nn.ModuleList),
    *(nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Identity, nn.Linear),
    *SURROGATES.values(),  # type: ignore[arg-type]
)


def why_not(model: nn.Module) -> str | None:
    """The reason why `model` cannot be evaluated here from spikes to spikes, or None.

    Each part must be one of the published classes, unchanged: what is computed here is written for these alone.
    """
    if edited := SparseInference.edited():
        return f"{', '.join(edited)} was edited"
    if watched(*model.modules()):
        return "somebody watches its layers with hooks"
    methods = {name.rpartition(".")[2] for name in SparseInference.stands_for}
    for name, layer in model.named_modules():
        kind: Any = plain_class(layer)
        if kind not in _CLASSES and not (layer is model and type(model) is SparseInference.model_class()):
            return f"{name or 'the model'} is {kind.__name__}, for which there is no such way"
        if replaced := methods & vars(layer).keys():
            return f"{name or 'the model'} has {', '.join(replaced)} of its own"
        if kind is MS_SSA_Conv and isinstance(layer.k_pool, nn.MaxPool3d):
            return "event mode (dvs_mode) pools over heads inside the attention, which is not built on bits"
        if kind is nn.BatchNorm2d and layer.running_mean is None:
            return f"{name} keeps no running statistics to fold"
        if hasattr(layer, "v_threshold") and (layer.v_reset != 0 or not layer.decay_input or layer.v_threshold <= 0):
            return f"{name} is not a neuron with hard reset to 0, input decay and a positive threshold"
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype} on {parameter.device}; float32 on a CPU is needed"
    return why_unusable()


class SparseInference(Substitute):
    """The evaluation of `model` from spikes to spikes; called like the model, equal to `model.eval()` in float32.

    Sums are in another order, so membrane values differ by rounding, and a value within rounding of the threshold
    may fire in one and not in the other.

    Args:
        model: a `SpikeDrivenTransformer`. Its parameters and running statistics are read now; later changes have no
            effect.

    Raises:
        ValueError: `why_not(model)` has a reason.
    """

    runs_as = "spikes to spikes"
    stands_for: ClassVar[dict[str, str]] = {
        **{name: known for part in PARTS.values() for name, known in part.stands_for.items()},
        **KernelLIF.stands_for,
        **KernelParametricLIF.stands_for,
        "module.block:MS_Block_Conv.forward": "fc030af9f7b78114",
        "model:SpikeDrivenTransformer.forward": "5e93ad2ed8bb5151",
        "model:SpikeDrivenTransformer.forward_features": "830e7f129ac0c746",
        "model:SpikeDrivenTransformer.forward_head": "9a983eb745786794",
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if reason := why_not(model):
            raise ValueError(f"this model cannot be evaluated from spikes to spikes: {reason}")
        self._model: list[Any] = [model]  # in a list: its parameters are not this module's
        self.network = Network(model)
        self.train(False)

    @staticmethod
    def model_class() -> type[nn.Module]:
        return importlib.import_module("model").SpikeDrivenTransformer

    def additions(self) -> dict[str, int]:
        """Additions of weights of each layer since construction; the first convolution, of an image, multiplies."""
        return {name: layer.additions for name, layer in self.network.layers.items()}

    def frames(self, x: Tensor) -> Tensor:
        """Images or event frames -> float32 `[T, B, C, H, W]`."""
        frames: Tensor = self._model[0]._to_time_first(x.float())
        return frames

    @torch.no_grad()
    def forward(self, x: Tensor, hook: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:  # type: ignore[override]
        """Logits `[B, K]` (`[T, B, K]` with TET) of images `[B, C, H, W]` or event frames `[B, T, C, H, W]`.

        With a `hook` to fill with spike tensors, the model's own forward runs.
        """
        (model,) = self._model
        if hook is not None:
            logits, hook = model.eval()(x, hook)
            return logits, hook
        with torch.autocast("cpu", enabled=False):
            logits = self.network.logits(self.frames(x))
        return logits.clone() if model.TET else logits.mean(dim=0), None


class _PartOnBits(FusedPart):
    """One part as `SparseInference` computes it, for the proof."""

    def fast_forward(self, x: Tensor) -> Tensor:
        network, (T, B, C, H, W) = Network(self), x.shape
        p = Program(network.layers)
        if isinstance(self, MS_SPS):
            given = p.values("image", T, B, H, W, C)
            u, _ = network.patch_embed(p, "", self, given, T)
        else:
            given = p.values("u", T, B, H, W, C)
            first: Any = self.shortcut_lif if isinstance(self, MS_SSA_Conv) else self.fc1_lif
            u, _ = network.part(p, "", self, given, p.fire(given, "s", first))
        return read(p.run(given, x), u).permute(0, 1, 4, 2, 3)


def _on_bits(plain: type[nn.Module]) -> type[FusedPart]:
    members = dict(plain_class=plain, neurons=PARTS[plain].neurons, __module__=__name__)
    return type(f"{plain.__name__}OnBits", (_PartOnBits, plain), members)


ON_BITS: dict[type[nn.Module], type[FusedPart]] = {kind: _on_bits(kind) for kind in (MS_SPS, MS_SSA_Conv, MS_MLP_Conv)}
