"""Spike-driven self-attention, SDSA (paper section 3.3, equations 5 to 7): mask and add, no product, no softmax.

The paper's V_S is `q` here, its Q_S and K_S are `k` and `v`, and g(Q_S, K_S) is the output of `talking_heads_lif`.

Legend: T time steps, B batch, D channels, H x W feature map, N = H*W tokens, h heads.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module.kernels import attention as attention_ops
from module.kernels.fused import (
    can_fuse_neurons,
    can_fuse_norms,
    is_folded,
    norm_add,
    norm_neuron,
    norms_neuron,
    over_time,
    watched,
)
from module.neuron import LIF, SpikingNode, make_neuron

# Threshold of the neuron that turns the token sum into a channel mask.
ATTENTION_THRESHOLD = 0.5


class MS_SSA_Conv(nn.Module):
    """SDSA with a membrane shortcut.

    Args:
        dim: D, a multiple of `num_heads`.
        num_heads: h. The mask is per channel, so h shapes only the recorded tensors and, in event mode, the pools.
        dvs_mode: event mode, max-pools k, v, k*v and the masked q over 3x3 neighbourhoods.
        spike_mode, backend, neuron_dtype: see `module.neuron.make_neuron`.

    Shape: membrane values `[T, B, D, H, W]` -> the same.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        spike_mode: str = "lif",
        dvs_mode: bool = False,
        backend: str = "auto",
        neuron_dtype: str = "float32",
    ) -> None:
        super().__init__()
        if num_heads <= 0 or dim % num_heads:
            raise ValueError(f"embed_dims={dim} must be divisible by num_heads={num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        neuron = functools.partial(make_neuron, spike_mode, backend=backend, neuron_dtype=neuron_dtype)

        self.shortcut_lif = neuron()
        self.q_conv = nn.Conv2d(dim, dim, kernel_size=1, bias=False)
        self.q_bn = nn.BatchNorm2d(dim)
        self.q_lif = neuron()
        self.k_conv = nn.Conv2d(dim, dim, kernel_size=1, bias=False)
        self.k_bn = nn.BatchNorm2d(dim)
        self.k_lif = neuron()
        self.v_conv = nn.Conv2d(dim, dim, kernel_size=1, bias=False)
        self.v_bn = nn.BatchNorm2d(dim)
        self.v_lif = neuron()
        self.talking_heads_lif = neuron(v_threshold=ATTENTION_THRESHOLD)
        self.proj_conv = nn.Conv2d(dim, dim, kernel_size=1)
        self.proj_bn = nn.BatchNorm2d(dim)

        # Never called, kept for the keys of published checkpoints; without gradient, so that data-parallel
        # training need not search for unused parameters.
        self.attn_lif = neuron(v_threshold=ATTENTION_THRESHOLD).requires_grad_(False)
        self.talking_heads = nn.Conv1d(num_heads, num_heads, kernel_size=1, bias=False).requires_grad_(False)

        # The event-mode pools, identities otherwise. Their outputs, and those of the two identities below, are the
        # places where `spike_sources` reads; none has parameters.
        self.k_pool = self._pool(dvs_mode)
        self.v_pool = self._pool(dvs_mode)
        self.kv_before = nn.Identity()
        self.kv_pool = self._pool(dvs_mode)
        self.x_pool = self._pool(dvs_mode)
        self.x_after_qkv = nn.Identity()

    @staticmethod
    def _pool(dvs_mode: bool) -> nn.Module:
        """3x3 over the last two dimensions of a 5-D tensor: its first two act as batch and channel."""
        if not dvs_mode:
            return nn.Identity()
        return nn.MaxPool3d(kernel_size=(1, 3, 3), stride=1, padding=(0, 1, 1))

    def _split_heads(self, x: Tensor) -> Tensor:
        """`[T, B, D, H, W]` -> `[T, B, h, N, D/h]`."""
        x = x.flatten(3).unflatten(2, (self.num_heads, -1))  # [T, B, h, D/h, N]
        return x.transpose(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        s = self.shortcut_lif(x)
        y = self._attend_fused(s) if self._can_fuse(s) else self._attend(s)
        y = self.x_after_qkv(y)  # [T, B, D, H, W]
        return norm_add(self.proj_bn, over_time(self.proj_conv, y), x, self.shortcut_lif)

    def _attend(self, s: Tensor) -> Tensor:
        """Spikes `[T, B, D, H, W]` -> masked q, the same shape; layer by layer."""
        H, W = s.shape[-2:]
        q = norm_neuron(self.q_bn, self.q_lif, over_time(self.q_conv, s))
        k = self.k_pool(norm_neuron(self.k_bn, self.k_lif, over_time(self.k_conv, s)))
        v = self.v_pool(norm_neuron(self.v_bn, self.v_lif, over_time(self.v_conv, s)))

        kv = self.kv_before(self._split_heads(k) * self._split_heads(v))  # AND of spikes, [T, B, h, N, D/h]
        kv = self.kv_pool(kv).sum(dim=3, keepdim=True)  # [T, B, h, 1, D/h]
        mask = self.talking_heads_lif(kv)
        y = self.x_pool(self._split_heads(q) * mask)  # [T, B, h, N, D/h]
        return y.transpose(3, 4).flatten(2, 3).unflatten(3, (H, W))  # [T, B, D, H, W]

    def _can_fuse(self, s: Tensor) -> bool:
        """Whether q, k, v can be one product and the attention one operator: nothing watched in between."""
        if not isinstance(self.k_pool, nn.Identity) or not isinstance(self.q_lif, LIF):
            return False  # event mode pools over tokens and channels; parametric neurons have a tau each
        norms = (self.q_bn, self.k_bn, self.v_bn)
        neurons = (self.q_lif, self.k_lif, self.v_lif, self.talking_heads_lif)
        between = (self.k_pool, self.v_pool, self.kv_before, self.kv_pool, self.x_pool)
        if watched(self.q_conv, self.k_conv, self.v_conv, *between):
            return False
        if len({neuron.v_threshold for neuron in neurons[:3]}) > 1 or not can_fuse_neurons(s, *neurons):
            return False
        return is_folded(*norms) or (can_fuse_norms(s, *norms) and len({norm.eps for norm in norms}) == 1)

    def _attend_fused(self, s: Tensor) -> Tensor:
        """As `_attend`: one product for q, k, v, and sums over tokens per channel, for which heads do not matter."""
        assert isinstance(self.q_lif, SpikingNode)
        assert isinstance(self.talking_heads_lif, SpikingNode)
        convs, norms = (self.q_conv, self.k_conv, self.v_conv), [self.q_bn, self.k_bn, self.v_bn]
        weight = torch.cat([conv.weight for conv in convs])  # [3 D, D, 1, 1]
        biases = [conv.bias for conv in convs if conv.bias is not None]  # none, or all where BatchNorm was folded
        bias = torch.cat(biases) if biases else None
        # An event-driven layer computes the joined weights its own way.
        convolve = getattr(self.q_conv, "convolve", F.conv2d)
        qkv = convolve(s.flatten(0, 1), weight, bias).unflatten(0, s.shape[:2])  # [T, B, 3 D, H, W]
        qkv = self.q_lif(qkv) if is_folded(*norms) else norms_neuron(norms, self.q_lif, qkv, len(s))
        y, _ = attention_ops.attend(qkv, self.talking_heads_lif.decay(qkv), *self.talking_heads_lif.constants())
        return y

    def spike_sources(self, prefix: str) -> dict[str, nn.Module]:
        """Published hook name -> the submodule whose output is that spike tensor, in order of computation."""
        return {
            f"{prefix}_first_lif": self.shortcut_lif,
            f"{prefix}_q_lif": self.q_lif,
            f"{prefix}_k_lif": self.k_pool,
            f"{prefix}_v_lif": self.v_pool,
            f"{prefix}_kv_before": self.kv_before,
            f"{prefix}_kv": self.talking_heads_lif,
            f"{prefix}_x_after_qkv": self.x_after_qkv,
        }
