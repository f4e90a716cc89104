"""A model of your own: two convolutions with spiking neurons, and a linear head."""

from timm.models import register_model
from torch import Tensor, nn

from module.layers import over_time
from module.neuron import make_neuron


class ConvSNN(nn.Module):
    def __init__(self, T: int, in_channels: int, num_classes: int, spike_mode: str, width: int = 16) -> None:
        super().__init__()
        self.T = T
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.lif1, self.lif2 = make_neuron(spike_mode), make_neuron(spike_mode)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = x.expand(self.T, *x.shape) if x.dim() == 4 else x.transpose(0, 1)  # images or events -> [T, B, C, H, W]
        s = self.lif1(over_time(x, self.conv1, self.bn1))
        s = self.lif2(over_time(s, self.conv2, self.bn2))
        return self.head(s.mean(dim=(3, 4))).mean(dim=0), None  # logits [B, K]


@register_model
def conv_snn(T=4, in_channels=3, num_classes=10, spike_mode="lif") -> ConvSNN:
    return ConvSNN(T, in_channels, num_classes, spike_mode)
