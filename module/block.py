"""One encoder block: spike-driven self-attention, then the MLP (paper section 3.2, equations 3 and 4)."""

from __future__ import annotations

from torch import Tensor, nn

from module.attention import MS_SSA_Conv
from module.mlp import MS_MLP_Conv


class MS_Block_Conv(nn.Module):
    """SDSA and MLP, both with membrane shortcuts.

    Published runs build a drop path from their settings and never apply it; there is none here.

    Shape: membrane values `[T, B, D, H, W]` -> the same.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`, or `mlp_ratio` gives no channel.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        spike_mode: str = "lif",
        dvs_mode: bool = False,
        backend: str = "auto",
        neuron_dtype: str = "float32",
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP no channel at embed_dims={dim}")
        self.attn = MS_SSA_Conv(dim, num_heads, spike_mode, dvs_mode, backend, neuron_dtype)
        self.mlp = MS_MLP_Conv(dim, hidden, spike_mode, backend, neuron_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))
