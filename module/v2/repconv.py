"""RepConv: layers that are trained apart and equal one 3x3 convolution in evaluation.

Legend: T time steps, B batch, C channels, H x W feature map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class BorderedBatchNorm(nn.Module):
    """BatchNorm, then a border of one pixel that holds what BatchNorm makes of a zero by its running statistics.

    With this border, and no padding in the depthwise convolution after it, the layers of `RepConv` equal one 3x3
    convolution with zero padding once the running statistics are used for the inside as well, in evaluation. In
    training the inside is normalised by the batch and the border by the running statistics after this batch, so the
    output depends on them. Weight and bias get their gradients from the inside alone.

    Shape: `[T*B, C, H, W]` -> `[T*B, C, H + 2, W + 2]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)  # before the border: it updates the running statistics
        N, C, H, W = y.shape
        bordered = self.border().to(y.dtype).view(1, C, 1, 1).expand(N, C, H + 2, W + 2).contiguous()
        bordered[:, :, 1:-1, 1:-1] = y
        return bordered

    @torch.no_grad()
    def border(self) -> Tensor:
        """`[C]`: BatchNorm of zero by the running statistics."""
        bn: Any = self.bn
        border: Tensor = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        return border


class RepConv(nn.Module):
    """1x1 convolution, BatchNorm with a border, depthwise 3x3 and 1x1 convolutions, BatchNorm; no neuron inside.

    Shape: `[T*B, C, H, W]` -> the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            BorderedBatchNorm(channels),
            nn.Sequential(
                nn.Conv2d(channels, channels, kernel_size=3, groups=channels, bias=False),  # the border is its padding
                nn.Conv2d(channels, channels, kernel_size=1, bias=False),
                nn.BatchNorm2d(channels),
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


def rep_conv(channels: int) -> nn.Sequential:
    """RepConv and the BatchNorm after it, under the published keys `0` and `1`."""
    return nn.Sequential(RepConv(channels), nn.BatchNorm2d(channels))
