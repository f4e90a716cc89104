"""One encoder block: spike-driven self-attention, then the MLP (paper section 3.2, equations 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.mlp import MS_MLP_Conv
from module.neuron import NeuronFactory, make_neuron, neurons_of


class MS_Block_Conv(nn.Module):
    """SDSA and MLP, both with membrane shortcuts.

    Published runs build a drop path from their settings and never apply it; there is none here.

    Args:
        dim: D.
        num_heads: see `MS_SSA_Conv`.
        mlp_ratio: hidden channels of the MLP, in units of D.
        dvs_mode: event mode of the attention.
        neuron: makes a layer of neurons.
        attn_layer: called as `attn_layer(dim, num_heads, dvs_mode=dvs_mode, neuron=neuron)`.
        mlp_layer: called as `mlp_layer(dim, hidden, neuron=neuron)`.

    Shape: membrane values `[T, B, D, H, W]` -> the same.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`, or `mlp_ratio` gives no channel.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        *,
        dvs_mode: bool = False,
        neuron: NeuronFactory = make_neuron,
        attn_layer: Callable[..., nn.Module] = MS_SSA_Conv,
        mlp_layer: Callable[..., nn.Module] = MS_MLP_Conv,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP no channel at embed_dims={dim}")
        self.attn = attn_layer(dim, num_heads, dvs_mode=dvs_mode, neuron=neuron)
        self.mlp = mlp_layer(dim, hidden, neuron=neuron)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))

    def spike_sources(self, index: int) -> dict[str, nn.Module]:
        """Hook name in block `index` -> the submodule whose output is that spike tensor."""
        return spike_sources_of(self.attn, f"MS_SSA_Conv{index}") | spike_sources_of(self.mlp, f"MS_MLP_Conv{index}")


def spike_sources_of(part: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """What the part itself says its spike tensors are, else its neurons by their names."""
    own = getattr(part, "spike_sources", None)
    if own is not None:
        return own(prefix)
    return {f"{prefix}_{name.replace('.', '_')}": neuron for name, neuron in neurons_of(part).items()}
