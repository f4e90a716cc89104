"""BatchNorm with statistics over all processes, for CPU runs; torch's own SyncBatchNorm takes GPU tensors only.

Legend: N batch (time and batch together), C channels, H x W feature map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """Sum over all processes. The gradient of a sum is that of each term: again the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncBatchNormCPU(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics span the process group (Ioffe & Szegedy 2015, equation 1 to 4).

    Shape: `[N, C, H, W]` -> the same. In evaluation, and without a process group, it is plain BatchNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        dims = (0, 2, 3)
        count = x.new_tensor(x.numel() // x.shape[1])
        sums: Tensor = _SumOverProcesses.apply(torch.cat([x.sum(dims), count.view(1)]))
        n = sums[-1].detach()
        mean = sums[:-1] / n  # [C]
        centred = x - mean.view(1, -1, 1, 1)
        # The second moment around the mean, in a second pass: the difference of two large sums loses digits.
        squares: Tensor = _SumOverProcesses.apply(centred.square().sum(dims))
        variance = squares / n
        self._track(mean.detach(), (squares / (n - 1)).detach())
        y = centred * torch.rsqrt(variance + self.eps).view(1, -1, 1, 1)
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of `model` share its statistics over the processes; keys and values stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNormCPU
    return model
