"""Evaluation from spikes to spikes: BatchNorm folded, neurons inside the convolutions, bits between layers.

A Spike-driven Transformer is computed as its paper describes it: after the first convolution every layer adds weight
rows of active inputs, and only spikes, one bit each, travel between layers. The currents of a neuron never leave
the cache. Parameters are read once, at construction.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims, P = T*B*H*W pixels, K classes.
Spikes are int64 bits `[P, ceil(C/64)]`, membrane values float32 `[P, C]`; both in the order T, B, H, W.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.block import MS_Block_Conv
from module.folding import folded
from module.kernels.neurons import KernelLIF, KernelParametricLIF
from module.kernels.parts import PARTS, FusedPart
from module.kernels.substitute import Substitute, plain_class, watched
from module.mlp import MS_MLP_Conv
from module.neuron import LIF, SURROGATES, ParametricLIF
from module.sparse.conv import why_unusable
from module.sparse.crossover import crossover
from module.sparse.library import load
from module.sparse.ops import checked, pack_weight, pointer, unpack_spikes
from module.sps import MS_SPS


@dataclass
class _Map:
    """A feature map of spikes."""

    bits: Tensor
    steps: int
    batch: int
    height: int
    width: int
    channels: int

    @property
    def pixels(self) -> int:
        return self.steps * self.batch * self.height * self.width

    def empty(self, channels: int) -> _Map:
        """No spikes, same pixels, `channels` channels."""
        bits = torch.zeros(self.pixels, (channels + 63) // 64, dtype=torch.int64)
        return _Map(bits, self.steps, self.batch, self.height, self.width, channels)


@dataclass
class _Neuron:
    """What the kernels need of a LIF or parametric LIF layer."""

    decay: float
    threshold: float

    @classmethod
    def of(cls, node: Any) -> _Neuron:
        decay = float(node.w.detach().float().sigmoid()) if hasattr(node, "w") else 1.0 / node.tau
        return cls(decay, float(node.v_threshold))


@dataclass
class _Layer:
    """A convolution with its BatchNorm folded in. `additions` counts those of weights it did since it was built."""

    weight: Tensor  # [M, C, k, k]
    bias: Tensor  # [M]
    packed: Tensor = field(repr=False)
    additions: int = 0

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.Module) -> _Layer:
        exact = folded(conv, bn)
        weight = exact.weight.detach().contiguous(memory_format=torch.channels_last)
        bias = torch.zeros(conv.out_channels) if exact.bias is None else exact.bias.detach()
        return cls(weight, bias, pack_weight(weight))


# Of these the network may consist.
_CLASSES: tuple[type[nn.Module], ...] = (
    *(MS_SPS, MS_SSA_Conv, MS_MLP_Conv, MS_Block_Conv, LIF, ParametricLIF, nn.ModuleList),
    *(nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Identity, nn.Linear),
    *SURROGATES.values(),  # type: ignore[arg-type]
)


class _Network:
    """The convolutions of `root`, a network or one part of it, with BatchNorm folded in, and the ways of its parts.

    Args:
        auto: compute a layer densely above the firing rate where that is faster on this machine.
    """

    def __init__(self, root: nn.Module, *, auto: bool) -> None:
        self.auto = auto
        self.layers: dict[str, _Layer] = {}
        with torch.no_grad():
            for name, layer in root.named_modules():
                if isinstance(layer, nn.Conv2d):
                    self.layers[name] = _Layer.of(layer, root.get_submodule(name.replace("conv", "bn")))

    def patch_embed(self, name: str, sps: MS_SPS, x: Tensor) -> tuple[Tensor, _Map]:
        """`[T, B, C, H, W]` -> membrane values `[P, D]`, and the map they belong to."""
        T, B, _, H, W = x.shape
        static = x.stride(0) == 0  # the same image at each step: its currents are computed once
        first = self.layers[f"{name}proj_conv"]
        frames = (x[0] if static else x.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
        current = F.conv2d(frames, first.weight, first.bias, padding=1).contiguous(memory_format=torch.channels_last)
        s = self._fire(sps.proj_lif, current, _Map(current, T, B, H, W, len(first.bias)), static=static)
        s = self._pool(sps.maxpool, s)
        s = self._pool(sps.maxpool1, self._spikes(f"{name}proj_conv1", s, sps.proj_lif1))
        s = self._pool(sps.maxpool2, self._spikes(f"{name}proj_conv2", s, sps.proj_lif2))
        u = self._membrane(f"{name}proj_conv3", s)
        if isinstance(sps.maxpool3, nn.MaxPool2d):
            image = u.view(T * B, s.height, s.width, -1).permute(0, 3, 1, 2)
            pooled = sps.maxpool3(image).contiguous(memory_format=torch.channels_last)
            u, (H, W) = pooled.permute(0, 2, 3, 1).reshape(-1, u.shape[1]), pooled.shape[-2:]
            s = _Map(s.bits, T, B, H, W, s.channels)
        s = self._fire(sps.proj_lif3, u, _Map(u, T, B, s.height, s.width, u.shape[1]))
        return self._membrane(f"{name}rpe_conv", s, residual=u), s

    def attention(self, name: str, attn: MS_SSA_Conv, u: Tensor, pixels: _Map) -> Tensor:
        s = self._fire(attn.shortcut_lif, u, pixels)
        q = self._spikes(f"{name}q_conv", s, attn.q_lif)
        k = self._spikes(f"{name}k_conv", s, attn.k_lif)
        v = self._spikes(f"{name}v_conv", s, attn.v_lif)
        neuron = _Neuron.of(attn.talking_heads_lif)
        tokens, threads = q.height * q.width, torch.get_num_threads()
        checked(
            load().sparse_attention(
                *(pointer(q.bits), pointer(k.bits), pointer(v.bits), q.steps, q.batch, tokens, q.channels),
                *(neuron.decay, neuron.threshold, threads),
            )
        )
        return self._membrane(f"{name}proj_conv", q, residual=u)

    def mlp(self, name: str, mlp: MS_MLP_Conv, u: Tensor, pixels: _Map) -> Tensor:
        s = self._fire(mlp.fc1_lif, u, pixels)
        if mlp.shortcut_after_fc1:
            u = self._membrane(f"{name}fc1_conv", s, residual=u)
            s = self._fire(mlp.fc2_lif, u, pixels)
        else:
            s = self._spikes(f"{name}fc1_conv", s, mlp.fc2_lif)
        return self._membrane(f"{name}fc2_conv", s, residual=u)

    def _spikes(self, name: str, s: _Map, node: nn.Module) -> _Map:
        """Convolution, BatchNorm and neuron: spikes in, spikes out."""
        layer, neuron = self.layers[name], _Neuron.of(node)
        if self._is_dense(layer, s):
            return self._fire(node, self._dense(layer, s), s)
        out = s.empty(len(layer.bias))
        self._convolve(layer, s, s.steps, spikes=out.bits, neuron=neuron)
        return out

    def _membrane(self, name: str, s: _Map, residual: Tensor | None = None) -> Tensor:
        """Convolution, BatchNorm and shortcut: spikes in, membrane values `[P, M]` out."""
        layer = self.layers[name]
        if self._is_dense(layer, s):
            out = self._dense(layer, s)
            return out if residual is None else out + residual
        out = torch.empty(s.pixels, len(layer.bias))
        self._convolve(layer, s, 1, out=out, residual=residual)
        return out

    def _convolve(
        self,
        layer: _Layer,
        s: _Map,
        steps: int,
        *,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        spikes: Tensor | None = None,
        neuron: _Neuron | None = None,
    ) -> None:
        M, C, k, _ = layer.weight.shape
        decay, threshold = (neuron.decay, neuron.threshold) if neuron else (0.0, 0.0)
        images = s.steps * s.batch // steps
        additions = load().sparse_forward(
            *(pointer(s.bits), steps, images, s.height, s.width, C, M, k * k, pointer(layer.packed)),
            *(pointer(layer.bias), pointer(residual), pointer(out), 0, pointer(spikes)),
            *(decay, threshold, torch.get_num_threads()),
        )
        layer.additions += checked(additions)

    def _is_dense(self, layer: _Layer, s: _Map) -> bool:
        if not self.auto:
            return False
        M, C, k, _ = layer.weight.shape
        spikes = load().sparse_count(pointer(s.bits), s.bits.numel(), torch.get_num_threads())
        return spikes > crossover(C, M, k, s.pixels) * s.pixels * C

    @staticmethod
    def _dense(layer: _Layer, s: _Map) -> Tensor:
        x = unpack_spikes(s.bits, (s.steps * s.batch, s.channels, s.height, s.width))
        out = F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)
        out = out.contiguous(memory_format=torch.channels_last)
        return out.permute(0, 2, 3, 1).reshape(s.pixels, -1)

    @staticmethod
    def _fire(node: nn.Module, current: Tensor, pixels: _Map, *, static: bool = False) -> _Map:
        """The neuron alone, on currents `[P, C]` (`static`: those of one step, the same at each)."""
        neuron = _Neuron.of(node)
        per_step, C = pixels.pixels // pixels.steps, current.numel() * (pixels.steps if static else 1) // pixels.pixels
        out = pixels.empty(C)
        load().sparse_lif(
            *(pointer(current), 0 if static else per_step * C, pixels.steps, per_step, C),
            *(neuron.decay, neuron.threshold, pointer(out.bits), torch.get_num_threads()),
        )
        return out

    @staticmethod
    def _pool(pool: nn.Module, s: _Map) -> _Map:
        if not isinstance(pool, nn.MaxPool2d):
            return s
        height, width = (s.height + 1) // 2, (s.width + 1) // 2
        bits = torch.empty(s.steps * s.batch * height * width, s.bits.shape[1], dtype=torch.int64)
        images, words = s.steps * s.batch, s.bits.shape[1]
        arguments = (images, s.height, s.width, words)
        load().sparse_pool(pointer(s.bits), *arguments, pointer(bits), torch.get_num_threads())
        return _Map(bits, s.steps, s.batch, height, width, s.channels)


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
        auto: compute a layer densely above the firing rate where that is faster on this machine.

    Raises:
        ValueError: `why_not(model)` has a reason.
    """

    runs_as = "spikes to spikes"
    stands_for: ClassVar[dict[str, str]] = {
        **{name: known for part in PARTS.values() for name, known in part.stands_for.items()},
        **KernelLIF.stands_for,
        **KernelParametricLIF.stands_for,
        "module.block:MS_Block_Conv.forward": "fc030af9f7b78114",
        "model:SpikeDrivenTransformer.forward_features": "74e3a9b90f66e1a5",
    }

    def __init__(self, model: nn.Module, *, auto: bool = True) -> None:
        super().__init__()
        if reason := why_not(model):
            raise ValueError(f"this model cannot be evaluated from spikes to spikes: {reason}")
        self._model: list[Any] = [model]  # in a list: its parameters are not this module's
        self.network = _Network(model, auto=auto)
        self.train(False)

    @staticmethod
    def model_class() -> type[nn.Module]:
        return importlib.import_module("model").SpikeDrivenTransformer  # type: ignore[no-any-return]

    def additions(self) -> dict[str, int]:
        """Additions of weights each layer did since construction; a layer computed densely adds none."""
        return {name: layer.additions for name, layer in self.network.layers.items()}

    @torch.no_grad()
    def forward(self, x: Tensor, hook: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:  # type: ignore[override]
        """Logits `[B, K]` (`[T, B, K]` with TET) of images `[B, C, H, W]` or event frames `[B, T, C, H, W]`.

        With a `hook` to fill with spike tensors, the model's own forward runs.
        """
        (model,) = self._model
        if hook is not None:
            logits, hook = model.eval()(x, hook)
            return logits, hook
        network = self.network
        with torch.autocast("cpu", enabled=False):
            u, pixels = network.patch_embed("patch_embed.", model.patch_embed, model._to_time_first(x.float()))
            for i, block in enumerate(model.block):
                u = network.attention(f"block.{i}.attn.", block.attn, u, pixels)
                u = network.mlp(f"block.{i}.mlp.", block.mlp, u, pixels)
            features = u.view(pixels.steps, pixels.batch, -1, u.shape[1]).mean(dim=2)  # [T, B, D]
            return model.forward_head(features), None


class _PartOnBits(FusedPart):
    """One part as `SparseInference` computes it, for the proof."""

    def fast_forward(self, x: Tensor) -> Tensor:
        network, T, B = _Network(self, auto=False), *x.shape[:2]
        if isinstance(self, MS_SPS):
            u, pixels = network.patch_embed("", self, x)
        else:
            C, H, W = x.shape[2:]
            u = x.permute(0, 1, 3, 4, 2).reshape(-1, C).contiguous()
            pixels = _Map(u, T, B, H, W, C)
            u = (
                network.attention("", self, u, pixels)
                if isinstance(self, MS_SSA_Conv)
                else network.mlp("", self, u, pixels)
            )  # type: ignore[arg-type]
        return u.view(T, B, pixels.height, pixels.width, -1).permute(0, 1, 4, 2, 3)


class _SPSOnBits(_PartOnBits, MS_SPS):
    plain_class: ClassVar[type[nn.Module]] = MS_SPS
    neurons: ClassVar[dict[str, str | None]] = PARTS[MS_SPS].neurons


class _SSAOnBits(_PartOnBits, MS_SSA_Conv):
    plain_class: ClassVar[type[nn.Module]] = MS_SSA_Conv
    neurons: ClassVar[dict[str, str | None]] = PARTS[MS_SSA_Conv].neurons


class _MLPOnBits(_PartOnBits, MS_MLP_Conv):
    plain_class: ClassVar[type[nn.Module]] = MS_MLP_Conv
    neurons: ClassVar[dict[str, str | None]] = PARTS[MS_MLP_Conv].neurons


ON_BITS: dict[type[nn.Module], type[FusedPart]] = {
    part.plain_class: part for part in (_SPSOnBits, _SSAOnBits, _MLPOnBits)
}
