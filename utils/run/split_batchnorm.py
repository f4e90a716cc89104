"""BatchNorm with statistics of its own for each augmented copy of a batch (Xie et al. 2020, AdvProp).

Legend: T time steps, S copies, B images per copy, C channels.
"""

from __future__ import annotations

from timm.layers import SplitBatchNorm2d, convert_splitbn_model
from torch import Tensor, nn


class SplitBatchNormOverTime(SplitBatchNorm2d):
    """timm's split BatchNorm for spiking layers, whose first dimension holds T before the S copies.

    timm splits that dimension in S parts, which would part the time steps instead of the copies.

    Shape: `[T*S*B, C, H, W]` -> the same. Key names are timm's.
    """

    time_steps: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            y: Tensor = super().forward(x)
            return y
        copies = x.unflatten(0, (self.time_steps, self.num_splits, -1)).transpose(0, 1)  # [S, T, B, C, H, W]
        parts: Tensor = super().forward(copies.flatten(0, 2))
        return parts.unflatten(0, (self.num_splits, self.time_steps, -1)).transpose(0, 1).flatten(0, 2)


def convert_split_batchnorm(model: nn.Module, copies: int, time_steps: int) -> nn.Module:
    """Give every BatchNorm of `model` statistics for each of `copies`; the first copy's are evaluated."""
    model = convert_splitbn_model(model, copies)
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.__class__ = SplitBatchNormOverTime
            module.time_steps = time_steps
    return model
