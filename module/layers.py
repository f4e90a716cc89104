"""How layers that know no time are applied to a sequence.

Legend: T time steps, B batch, C channels, H x W feature map.
"""

from __future__ import annotations

from torch import Tensor, nn


def over_time(x: Tensor, *layers: nn.Module) -> Tensor:
    """The layers, one after the other, on every time step of `x` `[T, B, C, H, W]` -> `[T, B, C', H', W']`.

    Time and batch become one dimension, so the statistics of a BatchNorm are over both (as published).
    """
    y = x.flatten(0, 1)  # [T*B, C, H, W]
    for layer in layers:
        y = layer(y)
    return y.unflatten(0, x.shape[:2])  # [T, B, C', H', W']
