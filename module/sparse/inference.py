"""Evaluation from spikes to spikes: BatchNorm folded, neurons inside the convolutions, bits between layers.

A Spike-driven Transformer is computed as its paper describes it: after the first convolution every layer adds weight
rows of active inputs, and only spikes, one bit each, travel between layers. The currents of a neuron never leave
the cache. Parameters are read once, at construction.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims, P = T*B*H*W pixels, K classes.
Spikes are int64 bits `[P, ceil(C/64)]`, membrane values float32 `[P, C]`; both in the order T, B, H, W.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.block import MS_Block_Conv
from module.kernels.native import NativeError
from module.mlp import MS_MLP_Conv
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
        if not isinstance(bn, nn.BatchNorm2d):  # folded into the convolution before
            bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()
            return cls(conv.weight.detach().clone(memory_format=torch.channels_last), bias, pack_weight(conv.weight))
        assert bn.running_mean is not None
        assert bn.running_var is not None
        # In float64: rounding must not be added to that of the folded weights themselves.
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        bias = bn.bias.double() - bn.running_mean.double() * scale
        if conv.bias is not None:
            bias = bias + conv.bias.double() * scale
        weight = (conv.weight.double() * scale[:, None, None, None]).float()
        return cls(weight.contiguous(memory_format=torch.channels_last), bias.float(), pack_weight(weight))


def why_not(model: nn.Module) -> str | None:
    """The reason why `model` cannot be evaluated here from spikes to spikes, or None."""
    if not isinstance(getattr(model, "patch_embed", None), MS_SPS):
        return f"{type(model).__name__} is no Spike-driven Transformer"
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype} on {parameter.device}; float32 on a CPU is needed"
    for name, layer in model.named_modules():
        if isinstance(layer, MS_SSA_Conv) and isinstance(layer.k_pool, nn.MaxPool3d):
            return "event mode (dvs_mode) pools over heads inside the attention, which is not built on bits"
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None:
            return f"{name} keeps no running statistics to fold"
        if hasattr(layer, "v_threshold") and (layer.v_reset != 0 or not layer.decay_input or layer.v_threshold <= 0):
            return f"{name} is not a neuron with hard reset to 0, input decay and a positive threshold"
    try:
        load()
    except NativeError as error:
        return str(error)
    return None


class EventInference(nn.Module):
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

    def __init__(self, model: nn.Module, *, auto: bool = True) -> None:
        super().__init__()
        if reason := why_not(model):
            raise ValueError(f"this model cannot be evaluated from spikes to spikes: {reason}")
        self._model: list[Any] = [model]  # in a list: its parameters are not this module's
        self.auto = auto
        self.layers: dict[str, _Layer] = {}
        with torch.no_grad():
            for name, layer in model.named_modules():
                if isinstance(layer, nn.Conv2d):
                    bn_name = name.replace("conv", "bn")
                    self.layers[name] = _Layer.of(layer, model.get_submodule(bn_name))
        self.train(False)

    def additions(self) -> dict[str, int]:
        """Additions of weights each layer did since construction; a layer computed densely adds none."""
        return {name: layer.additions for name, layer in self.layers.items()}

    @torch.no_grad()
    def forward(self, x: Tensor, hook: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Logits `[B, K]` (`[T, B, K]` with TET) of images `[B, C, H, W]` or event frames `[B, T, C, H, W]`.

        With a `hook` to fill with spike tensors, the model's own forward runs.
        """
        (model,) = self._model
        if hook is not None:
            logits, hook = model.eval()(x, hook)
            return logits, hook
        with torch.autocast("cpu", enabled=False):
            u, pixels = self._patch_embed(model.patch_embed, model._to_time_first(x.float()))
            for i, block in enumerate(model.block):
                assert isinstance(block, MS_Block_Conv)
                u = self._attention(f"block.{i}.attn", block.attn, u, pixels)
                u = self._mlp(f"block.{i}.mlp", block.mlp, u, pixels)
            features = u.view(pixels.steps, pixels.batch, -1, u.shape[1]).mean(dim=2)  # [T, B, D]
            return model.forward_head(features), None

    # ---------------------------------------------------------------------------------------------- the network

    def _patch_embed(self, sps: MS_SPS, x: Tensor) -> tuple[Tensor, _Map]:
        """`[T, B, C, H, W]` -> membrane values `[P, D]`, and the map they belong to."""
        T, B, _, H, W = x.shape
        static = x.stride(0) == 0  # the same image at each step: its currents are computed once
        first = self.layers["patch_embed.proj_conv"]
        frames = (x[0] if static else x.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
        current = F.conv2d(frames, first.weight, first.bias, padding=1).contiguous(memory_format=torch.channels_last)
        s = self._fire(sps.proj_lif, current, _Map(current, T, B, H, W, len(first.bias)), static=static)
        s = self._pool(sps.maxpool, s)
        s = self._pool(sps.maxpool1, self._spikes("patch_embed.proj_conv1", s, sps.proj_lif1))
        s = self._pool(sps.maxpool2, self._spikes("patch_embed.proj_conv2", s, sps.proj_lif2))
        u = self._membrane("patch_embed.proj_conv3", s)
        if isinstance(sps.maxpool3, nn.MaxPool2d):
            image = u.view(T * B, s.height, s.width, -1).permute(0, 3, 1, 2)
            pooled = sps.maxpool3(image).contiguous(memory_format=torch.channels_last)
            u, (H, W) = pooled.permute(0, 2, 3, 1).reshape(-1, u.shape[1]), pooled.shape[-2:]
            s = _Map(s.bits, T, B, H, W, s.channels)
        s = self._fire(sps.proj_lif3, u, _Map(u, T, B, s.height, s.width, u.shape[1]))
        return self._membrane("patch_embed.rpe_conv", s, residual=u), s

    def _attention(self, name: str, attn: MS_SSA_Conv, u: Tensor, pixels: _Map) -> Tensor:
        s = self._fire(attn.shortcut_lif, u, pixels)
        q = self._spikes(f"{name}.q_conv", s, attn.q_lif)
        k = self._spikes(f"{name}.k_conv", s, attn.k_lif)
        v = self._spikes(f"{name}.v_conv", s, attn.v_lif)
        neuron = _Neuron.of(attn.talking_heads_lif)
        tokens, threads = q.height * q.width, torch.get_num_threads()
        checked(
            load().event_attention(
                *(pointer(q.bits), pointer(k.bits), pointer(v.bits), q.steps, q.batch, tokens, q.channels),
                *(neuron.decay, neuron.threshold, threads),
            )
        )
        return self._membrane(f"{name}.proj_conv", q, residual=u)

    def _mlp(self, name: str, mlp: MS_MLP_Conv, u: Tensor, pixels: _Map) -> Tensor:
        s = self._fire(mlp.fc1_lif, u, pixels)
        if mlp.shortcut_after_fc1:
            u = self._membrane(f"{name}.fc1_conv", s, residual=u)
            s = self._fire(mlp.fc2_lif, u, pixels)
        else:
            s = self._spikes(f"{name}.fc1_conv", s, mlp.fc2_lif)
        return self._membrane(f"{name}.fc2_conv", s, residual=u)

    # ----------------------------------------------------------------------------------------------- the pieces

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
        additions = load().event_forward(
            *(pointer(s.bits), steps, images, s.height, s.width, C, M, k * k, pointer(layer.packed)),
            *(pointer(layer.bias), pointer(residual), pointer(out), 0, pointer(spikes)),
            *(decay, threshold, torch.get_num_threads()),
        )
        layer.additions += checked(additions)

    def _is_dense(self, layer: _Layer, s: _Map) -> bool:
        if not self.auto:
            return False
        M, C, k, _ = layer.weight.shape
        spikes = load().event_count(pointer(s.bits), s.bits.numel(), torch.get_num_threads())
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
        load().event_lif(
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
        load().event_pool(pointer(s.bits), *arguments, pointer(bits), torch.get_num_threads())
        return _Map(bits, s.steps, s.batch, height, width, s.channels)
