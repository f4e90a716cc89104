"""One Transformer block of V2: attention, then the MLP, each with a membrane shortcut."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from module.neuron import NeuronFactory, make_neuron
from module.v2.attention import Attention
from module.v2.mlp import MLP


class TransformerBlock(nn.Module):
    """x + attention(x), then x + MLP(x). There is no drop path: published runs build one and never apply it.

    Args:
        dim: C.
        num_heads: see `Attention`.
        mlp_ratio: hidden channels of the MLP, in units of C.
        neuron: makes a layer of neurons.
        attn_layer: called as `attn_layer(dim, num_heads, neuron=neuron)`.
        mlp_layer: called as `mlp_layer(dim, hidden, neuron=neuron)`.

    Shape: membrane values `[T, B, C, H, W]` -> the same.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4,
        *,
        neuron: NeuronFactory = make_neuron,
        attn_layer: Callable[..., nn.Module] = Attention,
        mlp_layer: Callable[..., nn.Module] = MLP,
    ) -> None:
        super().__init__()
        self.attn = attn_layer(dim, num_heads, neuron=neuron)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), neuron=neuron)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)
