"""An attention of your own: the channel mask is computed from the keys only, without the values."""

from timm.models import register_model
from torch import Tensor, nn

from model import SpikeDrivenTransformer, sdt
from module.layers import over_time
from module.neuron import NeuronFactory


class KeyMask(nn.Module):
    def __init__(self, dim: int, num_heads: int, *, dvs_mode: bool, neuron: NeuronFactory) -> None:
        super().__init__()
        self.shortcut_lif, self.q_lif, self.k_lif, self.mask_lif = neuron(), neuron(), neuron(), neuron(v_threshold=0.5)
        self.q_conv, self.k_conv, self.proj_conv = (nn.Conv2d(dim, dim, 1, bias=False) for _ in range(3))
        self.q_bn, self.k_bn, self.proj_bn = (nn.BatchNorm2d(dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:  # membrane values [T, B, D, H, W]
        s = self.shortcut_lif(x)
        q = self.q_lif(over_time(s, self.q_conv, self.q_bn))
        k = self.k_lif(over_time(s, self.k_conv, self.k_bn))
        mask = self.mask_lif(k.sum(dim=(3, 4), keepdim=True))  # [T, B, D, 1, 1]
        return over_time(q * mask, self.proj_conv, self.proj_bn) + x


@register_model
def sdt_key_mask(**settings) -> SpikeDrivenTransformer:
    return sdt(attn_layer=KeyMask, **settings)
