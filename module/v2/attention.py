"""Spike-driven self-attention of V2: q (k^T v) on spikes, without softmax.

Both products are sums of integers: k^T v adds rows of v where k fires, q (k^T v) adds rows of that where q fires.

Legend: T time steps, B batch, C channels, H x W feature map, N = H*W tokens, h heads, d = C/h.
"""

from __future__ import annotations

from torch import Tensor, nn

from module.layers import over_time
from module.neuron import NeuronFactory, make_neuron
from module.v2.repconv import rep_conv

# Threshold of the neuron after the two products.
ATTENTION_THRESHOLD = 0.5
# Published for every d; it is 1/sqrt(d) at d = 64 only. As a threshold: a sum of 8 fires at any potential.
SCALE = 0.125


class Attention(nn.Module):
    """Attention on spikes; q, k, v and the output each have a RepConv.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: h.
        neuron: makes a layer of neurons; called without arguments, or with `v_threshold`.

    Shape: membrane values `[T, B, C, H, W]` -> the same; the shortcut is the caller's.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, neuron: NeuronFactory = make_neuron) -> None:
        super().__init__()
        if num_heads <= 0 or dim % num_heads:
            raise ValueError(f"embed_dims={dim} must be divisible by num_heads={num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.head_lif = neuron()
        self.q_conv = rep_conv(dim)
        self.q_lif = neuron()
        self.k_conv = rep_conv(dim)
        self.k_lif = neuron()
        self.v_conv = rep_conv(dim)
        self.v_lif = neuron()
        self.attn_lif = neuron(v_threshold=ATTENTION_THRESHOLD)
        self.proj_conv = rep_conv(dim)

    def _split_heads(self, x: Tensor) -> Tensor:
        """`[T, B, C, H, W]` -> `[T, B, h, N, d]`; channel = head * d + index in the head."""
        return x.flatten(3).unflatten(2, (self.num_heads, -1)).transpose(3, 4)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Spikes `[T, B, C, H, W]`, three times -> q (k^T v) times the scale, `[T, B, C, N]`."""
        q, k, v = (self._split_heads(x) for x in (q, k, v))
        kv = k.transpose(3, 4) @ v  # [T, B, h, d, d]
        a = (q @ kv) * SCALE  # [T, B, h, N, d]
        return a.transpose(3, 4).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = self.head_lif(x)
        q = self.q_lif(over_time(s, self.q_conv))  # each [T, B, C, H, W]
        k = self.k_lif(over_time(s, self.k_conv))
        v = self.v_lif(over_time(s, self.v_conv))
        y = self.attn_lif(self._attend(q, k, v))  # [T, B, C, N]
        return over_time(y.unflatten(3, x.shape[3:]), self.proj_conv)
