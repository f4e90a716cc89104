"""Spiking patch splitting (paper section 3.2, figure 2): image or event frames to membrane-valued tokens.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from module.layers import over_time
from module.neuron import NeuronFactory, make_neuron


def check_pooling_stat(pooling_stat: str) -> None:
    """Raises ValueError unless `pooling_stat` is four characters 0 or 1."""
    if len(pooling_stat) != 4 or set(pooling_stat) - {"0", "1"}:
        raise ValueError(
            f"pooling_stat={pooling_stat!r} must be four characters, each '0' (no pooling) or '1' (max-pool) "
            "for one stage, for example '0011'"
        )


class MS_SPS(nn.Module):
    """Four conv stages and a conditional position stage with a membrane shortcut.

    Args:
        in_channels: channels of the input.
        embed_dims: D, a multiple of 8; the stages have D/8, D/4, D/2, D channels.
        pooling_stat: four characters; '1' ends that stage in a MaxPool2d(3, stride 2, padding 1).
        neuron: makes a layer of neurons; called without arguments.

    Shape: `[T, B, C, H, W]` -> `[T, B, D, H', W']`, membrane values.

    Raises:
        ValueError: a bad `pooling_stat`, or `embed_dims` that is no positive multiple of 8.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dims: int = 512,
        pooling_stat: str = "1111",
        *,
        neuron: NeuronFactory = make_neuron,
    ) -> None:
        super().__init__()
        check_pooling_stat(pooling_stat)
        if embed_dims <= 0 or embed_dims % 8:
            raise ValueError(f"embed_dims={embed_dims} must be a positive multiple of 8")
        self.pooling_stat = pooling_stat
        D = embed_dims
        conv = functools.partial(nn.Conv2d, kernel_size=3, stride=1, padding=1, bias=False)

        def pool(stage: int) -> nn.Module:
            pools = pooling_stat[stage] == "1"
            return nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if pools else nn.Identity()

        self.proj_conv = conv(in_channels, D // 8)
        self.proj_bn = nn.BatchNorm2d(D // 8)
        self.proj_lif = neuron()
        self.maxpool = pool(0)

        self.proj_conv1 = conv(D // 8, D // 4)
        self.proj_bn1 = nn.BatchNorm2d(D // 4)
        self.proj_lif1 = neuron()
        self.maxpool1 = pool(1)

        self.proj_conv2 = conv(D // 4, D // 2)
        self.proj_bn2 = nn.BatchNorm2d(D // 2)
        self.proj_lif2 = neuron()
        self.maxpool2 = pool(2)

        self.proj_conv3 = conv(D // 2, D)
        self.proj_bn3 = nn.BatchNorm2d(D)
        self.maxpool3 = pool(3)
        self.proj_lif3 = neuron()

        self.rpe_conv = conv(D, D)
        self.rpe_bn = nn.BatchNorm2d(D)
        # Never called; published checkpoints of parametric neurons carry its `w`.
        self.rpe_lif = neuron().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        s = over_time(self.proj_lif(over_time(x, self.proj_conv, self.proj_bn)), self.maxpool)
        s = over_time(self.proj_lif1(over_time(s, self.proj_conv1, self.proj_bn1)), self.maxpool1)
        s = over_time(self.proj_lif2(over_time(s, self.proj_conv2, self.proj_bn2)), self.maxpool2)
        # The last pool acts on membrane values: its result is the shortcut around the position stage.
        x = over_time(s, self.proj_conv3, self.proj_bn3, self.maxpool3)  # [T, B, D, H', W']
        return over_time(self.proj_lif3(x), self.rpe_conv, self.rpe_bn) + x

    def spike_sources(self, prefix: str = "MS_SPS") -> dict[str, nn.Module]:
        """Published hook name -> the submodule whose output is that spike tensor, in order of computation."""
        neurons = (self.proj_lif, self.proj_lif1, self.proj_lif2, self.proj_lif3)
        return {f"{prefix}_lif{i or ''}": neuron for i, neuron in enumerate(neurons)}
