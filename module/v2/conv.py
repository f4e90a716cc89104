"""The convolutional stages of V2: downsampling and conv blocks.

Membrane values travel between all parts; each neuron acts before its convolution.

Legend: T time steps, B batch, C channels, H x W feature map.
"""

from __future__ import annotations

from torch import Tensor, nn

from module.layers import over_time
from module.neuron import NeuronFactory, make_neuron


class DownSampling(nn.Module):
    """A neuron, a convolution that may halve the map, and BatchNorm.

    Args:
        in_channels, out_channels: C, C'.
        kernel_size: odd; the padding is half of it.
        stride: 2 gives ceil(H / 2) x ceil(W / 2).
        first: the first layer of a network takes the image as it is, without a neuron.
        neuron: makes a layer of neurons; called without arguments.

    Shape: membrane values (or an image) `[T, B, C, H, W]` -> membrane values `[T, B, C', H', W']`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 2,
        first: bool = False,
        neuron: NeuronFactory = make_neuron,
    ) -> None:
        super().__init__()
        if not first:
            self.encode_lif = neuron()
        self.first = first
        self.encode_conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)
        self.encode_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        s = x if self.first else self.encode_lif(x)
        return over_time(s, self.encode_conv, self.encode_bn)


class SeparableConv(nn.Module):
    """1x1 convolution C -> 2C, depthwise 7x7 and 1x1 convolution back to C.

    Between the last two there is neither BatchNorm nor neuron: as trained, real values enter the last one.

    Shape: membrane values `[T, B, C, H, W]` -> the same; the shortcut is the caller's.
    """

    def __init__(self, channels: int, *, neuron: NeuronFactory = make_neuron) -> None:
        super().__init__()
        inner = 2 * channels
        self.lif1 = neuron()
        self.pwconv1 = nn.Conv2d(channels, inner, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.lif2 = neuron()
        self.dwconv = nn.Conv2d(inner, inner, kernel_size=7, padding=3, groups=inner, bias=False)
        self.pwconv2 = nn.Conv2d(inner, channels, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        s = self.lif2(over_time(self.lif1(x), self.pwconv1, self.bn1))  # [T, B, 2C, H, W]
        return over_time(s, self.dwconv, self.pwconv2, self.bn2)


class ConvBlock(nn.Module):
    """A separable convolution, then two 3x3 convolutions C -> hidden -> C; both with membrane shortcuts.

    Args:
        channels: C.
        mlp_ratio: hidden channels in units of C.
        neuron: makes a layer of neurons; called without arguments.

    Shape: membrane values `[T, B, C, H, W]` -> the same.
    """

    def __init__(self, channels: int, mlp_ratio: float = 4, *, neuron: NeuronFactory = make_neuron) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.Conv = SeparableConv(channels, neuron=neuron)
        self.lif1 = neuron()
        self.conv1 = nn.Conv2d(channels, hidden, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.lif2 = neuron()
        self.conv2 = nn.Conv2d(hidden, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.Conv(x)
        s = self.lif2(over_time(self.lif1(x), self.conv1, self.bn1))  # [T, B, hidden, H, W]
        return x + over_time(s, self.conv2, self.bn2)
