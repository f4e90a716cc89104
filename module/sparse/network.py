"""The layers of a network as additions on bits: BatchNorm folded, neurons inside the convolutions.

After the first convolution every layer adds weight rows of active inputs, and only spikes, one bit each, travel between
layers. The currents of a neuron never leave the cache.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims, P = T*B*H*W pixels.
Spikes are int64 bits `[P, ceil(C/64)]`, membrane values float32 `[P, C]`; both in the order T, B, H, W.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.folding import folded
from module.mlp import MS_MLP_Conv
from module.sparse.crossover import crossover
from module.sparse.library import load
from module.sparse.ops import checked, pack_weight, pointer, unpack_spikes
from module.sps import MS_SPS


@dataclass
class SpikeMap:
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

    def empty(self, channels: int) -> SpikeMap:
        """No spikes, same pixels, `channels` channels."""
        bits = torch.zeros(self.pixels, (channels + 63) // 64, dtype=torch.int64)
        return SpikeMap(bits, self.steps, self.batch, self.height, self.width, channels)


@dataclass
class Neuron:
    """What the kernels need of a LIF or parametric LIF layer."""

    decay: float
    threshold: float

    @classmethod
    def of(cls, node: Any) -> Neuron:
        decay = float(node.w.detach().float().sigmoid()) if hasattr(node, "w") else 1.0 / node.tau
        return cls(decay, float(node.v_threshold))


@dataclass
class Layer:
    """A convolution with its BatchNorm folded in. `additions` counts those of weights it did since it was built."""

    weight: Tensor  # [M, C, k, k]
    bias: Tensor  # [M]
    packed: Tensor = field(repr=False)
    additions: int = 0

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.Module) -> Layer:
        exact = folded(conv, bn)
        weight = exact.weight.detach().contiguous(memory_format=torch.channels_last)
        bias = torch.zeros(conv.out_channels) if exact.bias is None else exact.bias.detach()
        return cls(weight, bias, pack_weight(weight))


class Network:
    """The convolutions of `root`, a network or one part of it, with BatchNorm folded in, and the ways of its parts.

    Args:
        auto: compute a layer densely above the firing rate where that is faster on this machine.
    """

    def __init__(self, root: nn.Module, *, auto: bool) -> None:
        self.auto = auto
        self.layers: dict[str, Layer] = {}
        with torch.no_grad():
            for name, layer in root.named_modules():
                if isinstance(layer, nn.Conv2d):
                    self.layers[name] = Layer.of(layer, root.get_submodule(name.replace("conv", "bn")))

    def patch_embed(self, name: str, sps: MS_SPS, x: Tensor) -> tuple[Tensor, SpikeMap]:
        """`[T, B, C, H, W]` -> membrane values `[P, D]`, and the map they belong to."""
        T, B, _, H, W = x.shape
        static = x.stride(0) == 0  # the same image at each step: its currents are computed once
        first = self.layers[f"{name}proj_conv"]
        frames = (x[0] if static else x.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
        current = F.conv2d(frames, first.weight, first.bias, padding=1).contiguous(memory_format=torch.channels_last)
        s = self._fire(sps.proj_lif, current, SpikeMap(current, T, B, H, W, len(first.bias)), static=static)
        s = self._pool(sps.maxpool, s)
        s = self._pool(sps.maxpool1, self._spikes(f"{name}proj_conv1", s, sps.proj_lif1))
        s = self._pool(sps.maxpool2, self._spikes(f"{name}proj_conv2", s, sps.proj_lif2))
        u = self._membrane(f"{name}proj_conv3", s)
        if isinstance(sps.maxpool3, nn.MaxPool2d):
            image = u.view(T * B, s.height, s.width, -1).permute(0, 3, 1, 2)
            pooled = sps.maxpool3(image).contiguous(memory_format=torch.channels_last)
            u, (H, W) = pooled.permute(0, 2, 3, 1).reshape(-1, u.shape[1]), pooled.shape[-2:]
            s = SpikeMap(s.bits, T, B, H, W, s.channels)
        s = self._fire(sps.proj_lif3, u, SpikeMap(u, T, B, s.height, s.width, u.shape[1]))
        return self._membrane(f"{name}rpe_conv", s, residual=u), s

    def attention(self, name: str, attn: MS_SSA_Conv, u: Tensor, pixels: SpikeMap) -> Tensor:
        s = self._fire(attn.shortcut_lif, u, pixels)
        q = self._spikes(f"{name}q_conv", s, attn.q_lif)
        k = self._spikes(f"{name}k_conv", s, attn.k_lif)
        v = self._spikes(f"{name}v_conv", s, attn.v_lif)
        neuron = Neuron.of(attn.talking_heads_lif)
        tokens, threads = q.height * q.width, torch.get_num_threads()
        checked(
            load().sparse_attention(
                *(pointer(q.bits), pointer(k.bits), pointer(v.bits), q.steps, q.batch, tokens, q.channels),
                *(neuron.decay, neuron.threshold, threads),
            )
        )
        return self._membrane(f"{name}proj_conv", q, residual=u)

    def mlp(self, name: str, mlp: MS_MLP_Conv, u: Tensor, pixels: SpikeMap) -> Tensor:
        s = self._fire(mlp.fc1_lif, u, pixels)
        if mlp.shortcut_after_fc1:
            u = self._membrane(f"{name}fc1_conv", s, residual=u)
            s = self._fire(mlp.fc2_lif, u, pixels)
        else:
            s = self._spikes(f"{name}fc1_conv", s, mlp.fc2_lif)
        return self._membrane(f"{name}fc2_conv", s, residual=u)

    def _spikes(self, name: str, s: SpikeMap, node: nn.Module) -> SpikeMap:
        """Convolution, BatchNorm and neuron: spikes in, spikes out."""
        layer, neuron = self.layers[name], Neuron.of(node)
        if self._is_dense(layer, s):
            return self._fire(node, self._dense(layer, s), s)
        out = s.empty(len(layer.bias))
        self._convolve(layer, s, s.steps, spikes=out.bits, neuron=neuron)
        return out

    def _membrane(self, name: str, s: SpikeMap, residual: Tensor | None = None) -> Tensor:
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
        layer: Layer,
        s: SpikeMap,
        steps: int,
        *,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        spikes: Tensor | None = None,
        neuron: Neuron | None = None,
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

    def _is_dense(self, layer: Layer, s: SpikeMap) -> bool:
        if not self.auto:
            return False
        M, C, k, _ = layer.weight.shape
        spikes = load().sparse_count(pointer(s.bits), s.bits.numel(), torch.get_num_threads())
        return spikes > crossover(C, M, k, s.pixels) * s.pixels * C

    @staticmethod
    def _dense(layer: Layer, s: SpikeMap) -> Tensor:
        x = unpack_spikes(s.bits, (s.steps * s.batch, s.channels, s.height, s.width))
        out = F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)
        out = out.contiguous(memory_format=torch.channels_last)
        return out.permute(0, 2, 3, 1).reshape(s.pixels, -1)

    @staticmethod
    def _fire(node: nn.Module, current: Tensor, pixels: SpikeMap, *, static: bool = False) -> SpikeMap:
        """The neuron alone, on currents `[P, C]` (`static`: those of one step, the same at each)."""
        neuron = Neuron.of(node)
        per_step, C = pixels.pixels // pixels.steps, current.numel() * (pixels.steps if static else 1) // pixels.pixels
        out = pixels.empty(C)
        load().sparse_lif(
            *(pointer(current), 0 if static else per_step * C, pixels.steps, per_step, C),
            *(neuron.decay, neuron.threshold, pointer(out.bits), torch.get_num_threads()),
        )
        return out

    @staticmethod
    def _pool(pool: nn.Module, s: SpikeMap) -> SpikeMap:
        if not isinstance(pool, nn.MaxPool2d):
            return s
        height, width = (s.height + 1) // 2, (s.width + 1) // 2
        bits = torch.empty(s.steps * s.batch * height * width, s.bits.shape[1], dtype=torch.int64)
        images, words = s.steps * s.batch, s.bits.shape[1]
        arguments = (images, s.height, s.width, words)
        load().sparse_pool(pointer(s.bits), *arguments, pointer(bits), torch.get_num_threads())
        return SpikeMap(bits, s.steps, s.batch, height, width, s.channels)
