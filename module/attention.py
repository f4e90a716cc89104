"""Spike-driven self-attention, SDSA (paper section 3.3, equations 5 to 7): mask and add, no product, no softmax.

The paper's V_S is `q` here, its Q_S and K_S are `k` and `v`, and g(Q_S, K_S) is the output of `talking_heads_lif`.

Legend: T time steps, B batch, D channels, H x W feature map, N = H*W tokens, h heads.
"""

from __future__ import annotations

from torch import Tensor, nn

from module.layers import over_time
from module.neuron import NeuronFactory, make_neuron

# Threshold of the neuron that turns the token sum into a channel mask.
ATTENTION_THRESHOLD = 0.5


class MS_SSA_Conv(nn.Module):
    """SDSA with a membrane shortcut.

    Args:
        dim: D, a multiple of `num_heads`.
        num_heads: h. The mask is per channel, so h shapes only the recorded tensors and, in event mode, the pools.
        dvs_mode: event mode, max-pools k, v, k*v and the masked q over 3x3 neighbourhoods.
        neuron: makes a layer of neurons; called without arguments, or with `v_threshold`.

    Shape: membrane values `[T, B, D, H, W]` -> the same.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, dvs_mode: bool = False, neuron: NeuronFactory = make_neuron
    ) -> None:
        super().__init__()
        if num_heads <= 0 or dim % num_heads:
            raise ValueError(f"embed_dims={dim} must be divisible by num_heads={num_heads}")
        self.dim = dim
        self.num_heads = num_heads

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
        y = self.x_after_qkv(self._attend(self.shortcut_lif(x)))  # spikes [T, B, D, H, W]
        return over_time(y, self.proj_conv, self.proj_bn) + x

    def _attend(self, s: Tensor) -> Tensor:
        """Spikes `[T, B, D, H, W]` -> q masked per channel by g(sum of k * v over tokens), the same shape."""
        H, W = s.shape[-2:]
        q = self.q_lif(over_time(s, self.q_conv, self.q_bn))  # each [T, B, D, H, W]
        k = self.k_pool(self.k_lif(over_time(s, self.k_conv, self.k_bn)))
        v = self.v_pool(self.v_lif(over_time(s, self.v_conv, self.v_bn)))

        kv = self.kv_before(self._split_heads(k) * self._split_heads(v))  # AND of spikes, [T, B, h, N, D/h]
        mask = self.talking_heads_lif(self.kv_pool(kv).sum(dim=3, keepdim=True))  # [T, B, h, 1, D/h]
        # The sum is float32 under autocast; a mask of spikes loses nothing in 16 bits, and keeps what follows in them.
        y = self.x_pool(self._split_heads(q) * mask.to(q.dtype))  # [T, B, h, N, D/h]
        return y.transpose(3, 4).flatten(2, 3).unflatten(3, (H, W))  # [T, B, D, H, W]

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
