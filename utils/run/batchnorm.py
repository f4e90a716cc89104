"""BatchNorm for two special cases: statistics over all processes, and statistics for each copy of an image.

`SyncBatchNormCPU` exists because torch's own SyncBatchNorm takes tensors on a GPU only. Separate statistics for each
augmented copy of a batch: Xie et al. 2020 (AdvProp).

Legend: N batch (time and batch together), T time steps, S copies, B images per copy, C channels, H x W feature map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import SplitBatchNorm2d, convert_splitbn_model
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

    Shape: `[N, C, H, W]` or `[N, C, L]` -> the same. In evaluation, and without a process group, it is plain
    BatchNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:  # of a BatchNorm1d
            return self.forward(x.unsqueeze(3)).squeeze(3)
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
    """Make every BatchNorm of `model` share its statistics over the processes; its state dict stays the same."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNormCPU
    return model


class SplitBatchNormOverTime(SplitBatchNorm2d):
    """timm's split BatchNorm for spiking layers, whose first dimension holds T before the S copies.

    timm splits that dimension in S parts, which would separate the time steps instead of the copies.

    Shape: `[T*S*B, C, H, W]` or `[T*S*B, C, L]` -> the same. Key names are timm's.
    """

    time_steps: int

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:  # of a BatchNorm1d
            return self.forward(x.unsqueeze(3)).squeeze(3)
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
