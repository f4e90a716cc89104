"""A block of your own: attention and MLP in parallel on the same input, x + attention(x) + MLP(x)."""

from timm.models import register_model
from torch import Tensor, nn

from model import SpikeDrivenTransformer, sdt


class ParallelBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, *, dvs_mode, neuron, attn_layer, mlp_layer) -> None:
        super().__init__()
        self.attn = attn_layer(dim, num_heads, dvs_mode=dvs_mode, neuron=neuron)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), neuron=neuron)

    def forward(self, x: Tensor) -> Tensor:  # membrane values [T, B, D, H, W]
        return self.attn(x) + self.mlp(x) - x  # both parts add x, so it is subtracted once


@register_model
def sdt_parallel(**settings) -> SpikeDrivenTransformer:
    return sdt(block_layer=ParallelBlock, **settings)
