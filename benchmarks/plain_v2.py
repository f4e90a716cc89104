"""The baseline of V2, **plain**: this model with SpikingJelly's neurons, as the published implementation computes it.

As benchmarks/plain.py for V1: the same parameters and results; every convolution, BatchNorm and neuron runs by itself
in the input's layout, a static image is convolved at each of the T steps, q, k and v each read their input, attention
splits heads. Kept apart from the model and its acceleration, so that speeding those up can never speed this up.

Legend: T time steps, B batch, C channels, H x W feature map, h heads, N tokens, d = C/h.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import choose_backend, neuron, over_time
from model import MetaSpikeFormer, sdt_v2_arguments
from module.v2.attention import Attention
from module.v2.conv import ConvBlock, DownSampling, SeparableConv
from module.v2.mlp import MLP


class PlainMetaSpikeFormer(MetaSpikeFormer):
    """`MetaSpikeFormer` with the forward pass of the published implementation; takes the arguments of `sdt_v2`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**sdt_v2_arguments(**({"neuron": neuron} | arguments)))

    def to(self, *args: Any, **kwargs: Any) -> PlainMetaSpikeFormer:
        moved = super().to(*args, **kwargs)
        choose_backend(moved)
        return moved

    def forward_features(self, x: Tensor) -> Tensor:
        x = self._to_time_first(x).contiguous()
        for name, part in self.named_children():
            for layer in part if isinstance(part, nn.ModuleList) else [part]:
                if name.startswith("downsample"):
                    x = _downsampling(layer, x)  # type: ignore[arg-type]
                elif name.startswith("ConvBlock"):
                    x = _conv_block(layer, x)  # type: ignore[arg-type]
                elif name.startswith("block"):
                    x = x + _attention(layer.attn, x)  # type: ignore[arg-type]
                    x = x + _mlp(layer.mlp, x)  # type: ignore[arg-type]
        return x.mean(dim=(3, 4))


def _downsampling(m: DownSampling, x: Tensor) -> Tensor:
    s = x if m.first else m.encode_lif(x)
    return over_time(m.encode_bn, over_time(m.encode_conv, s))


def _conv_block(m: ConvBlock, x: Tensor) -> Tensor:
    x = x + _separable_conv(m.Conv, x)
    s = m.lif2(over_time(m.bn1, over_time(m.conv1, m.lif1(x))))
    return x + over_time(m.bn2, over_time(m.conv2, s))


def _separable_conv(m: SeparableConv, x: Tensor) -> Tensor:
    s = m.lif2(over_time(m.bn1, over_time(m.pwconv1, m.lif1(x))))
    return over_time(m.bn2, over_time(m.pwconv2, over_time(m.dwconv, s)))


def _rep_conv(layers: Any, x: Tensor) -> Tensor:
    """`x` `[T*B, C, H, W]`."""
    first, bordered, (depthwise, second, inner) = layers[0].body
    y = F.pad(bordered.bn(first(x)), (1, 1, 1, 1))
    with torch.no_grad():
        bn = bordered.bn
        border = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
    border = border.view(1, -1, 1, 1)
    y[:, :, :1], y[:, :, -1:], y[:, :, :, :1], y[:, :, :, -1:] = border, border, border, border
    return layers[1](inner(second(depthwise(y))))


def _attention(m: Attention, x: Tensor) -> Tensor:
    T, B, C, H, W = x.shape
    s = m.head_lif(x)

    def heads(rep_conv: Any, node: nn.Module) -> Tensor:
        y = node(_rep_conv(rep_conv, s.flatten(0, 1)).view(T, B, C, H, W)).flatten(3)
        return y.transpose(2, 3).reshape(T, B, H * W, m.num_heads, -1).transpose(2, 3).contiguous()  # [T, B, h, N, d]

    q, k, v = (heads(c, n) for c, n in ((m.q_conv, m.q_lif), (m.k_conv, m.k_lif), (m.v_conv, m.v_lif)))
    y = (q @ (k.transpose(3, 4) @ v)) * 0.125
    y = m.attn_lif(y.transpose(3, 4).reshape(T, B, C, H * W).contiguous())
    return _rep_conv(m.proj_conv, y.view(T * B, C, H, W)).view(T, B, C, H, W)


def _mlp(m: MLP, x: Tensor) -> Tensor:
    a = over_time(m.fc1_bn, over_time(m.fc1_conv, m.fc1_lif(x.flatten(3)).contiguous()))
    b = over_time(m.fc2_bn, over_time(m.fc2_conv, m.fc2_lif(a)))
    return b.view(x.shape)
