"""Spiking patch splitting (paper section 3.2, figure 2): image or event frames to membrane-valued tokens.

Legend: T time steps, B batch, C channels, H x W feature map, D embed_dims.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from module.kernels.fused import convolved, norm_add, norm_neuron, over_time, pooled, watched
from module.neuron import backend_of, make_neuron


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
        spike_mode, backend, neuron_dtype: see `module.neuron.make_neuron`.

    Shape: `[T, B, C, H, W]` -> `[T, B, D, H', W']`, membrane values.

    Raises:
        ValueError: a bad `pooling_stat`, or `embed_dims` that is no positive multiple of 8.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dims: int = 512,
        pooling_stat: str = "1111",
        spike_mode: str = "lif",
        backend: str = "auto",
        neuron_dtype: str = "float32",
    ) -> None:
        super().__init__()
        check_pooling_stat(pooling_stat)
        if embed_dims <= 0 or embed_dims % 8:
            raise ValueError(f"embed_dims={embed_dims} must be a positive multiple of 8")
        self.pooling_stat = pooling_stat
        D = embed_dims
        neuron = functools.partial(make_neuron, spike_mode, backend=backend, neuron_dtype=neuron_dtype)
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
        steps = x.shape[0]
        x = norm_neuron(self.proj_bn, self.proj_lif, self._first_current(x), steps)
        x = pooled(self.maxpool, x, self.proj_lif)  # spikes [T, B, c, h, w]
        for conv, bn, lif, pool in (
            (self.proj_conv1, self.proj_bn1, self.proj_lif1, self.maxpool1),
            (self.proj_conv2, self.proj_bn2, self.proj_lif2, self.maxpool2),
        ):
            x = norm_neuron(bn, lif, convolved(conv, x, lif))
            x = pooled(pool, x, lif)
        # The last pool acts on membrane values: its result is the shortcut around the position stage.
        x = norm_add(self.proj_bn3, convolved(self.proj_conv3, x, self.proj_lif3), None, self.proj_lif3)
        x = pooled(self.maxpool3, x, self.proj_lif3)  # [T, B, D, H', W']
        current = convolved(self.rpe_conv, self.proj_lif3(x), self.proj_lif3)
        return norm_add(self.rpe_bn, current, x, self.proj_lif3)

    def _first_current(self, x: Tensor) -> Tensor:
        """The first conv of `x` `[T, B, C, H, W]`; `[1, B, c, H, W]` for a static image (the same at each step).

        Batch statistics over T equal copies are those over one. A watched conv sees every step.
        """
        if x.shape[0] > 1 and x.stride(0) == 0 and not watched(self.proj_conv):
            x = x[:1]
        if backend_of(self.proj_lif, x) != "cpp":
            return over_time(self.proj_conv, x)
        # On a CPU convolutions and the kernels after them are fastest with channels innermost; all that follows
        # keeps the layout. With one channel there is nothing to see in the input's, so the output's is set as well.
        return _channels_innermost(over_time(self.proj_conv, _channels_innermost(x)))


def _channels_innermost(x: Tensor) -> Tensor:
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
