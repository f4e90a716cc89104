"""Mixing the samples of a batch: timm's mixup and cutmix, also for event frames, and EventMix.

Legend: B batch, T time steps, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from utils.config.settings import Config
from utils.data.datasets import dataset_facts
from utils.errors import UserError

# Images or frames and labels [B] -> mixed ones and targets [B, K]
Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_COMPONENTS = 3  # of the Gaussian mixture that shapes EventMix's mask


class VideoMixup:
    """timm's mixup and cutmix on [B, T, C, H, W]: one weight or one box, the same at all T steps of a pair."""

    def __init__(self, mixup: Mixup) -> None:
        self.mixup = mixup

    def __call__(self, frames: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [B, T, C, H, W] and labels [B] -> mixed frames and targets [B, K]."""
        # timm cuts its boxes from the last two axes, which are space in [B, T * C, H, W].
        mixed, soft = self.mixup(frames.flatten(1, 2).contiguous(), targets)
        return mixed.view(frames.shape), soft


class EventMix:
    """Parts of two samples joined in space and time (EventMix: Shen et al., Information Sciences 644, 2023, arXiv
    2205.12054).

    Where a Gaussian mixture over (t, y, x) is large, events come from one sample, elsewhere from the other. The share
    of the volume is drawn from Beta(alpha, alpha); the weight of a label is the share of the events.

    Args:
        alpha: of the beta distribution.
        num_classes: K.
        smoothing: label smoothing.
    """

    def __init__(self, alpha: float, num_classes: int, smoothing: float) -> None:
        self.alpha, self.num_classes, self.smoothing = alpha, num_classes, smoothing

    def __call__(self, frames: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [B, T, C, H, W] and labels [B] -> mixed frames and targets [B, K]."""
        others = frames.roll(1, 0)
        T, _, H, W = frames.shape[1:]
        masks = torch.stack([self._mask((T, H, W), frames.device) for _ in range(len(frames))]).unsqueeze(2)
        mixed = torch.where(masks, frames, others)
        own = (frames * masks).sum(dim=(1, 2, 3, 4))
        total = mixed.sum(dim=(1, 2, 3, 4))
        weight = torch.where(total > 0, own / total, 1.0).unsqueeze(1)  # [B, 1]
        labels = F.one_hot(targets, self.num_classes).to(frames.dtype)
        labels = labels * (1.0 - self.smoothing) + self.smoothing / self.num_classes
        return mixed, labels * weight + labels.roll(1, 0) * (1.0 - weight)

    def _mask(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """Which places of [T, H, W] come from a sample itself, bool."""
        axes = [(torch.arange(n, device=device) + 0.5) / n for n in shape]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # [T, H, W, 3]
        density = torch.zeros(shape, device=device)
        for _ in range(_COMPONENTS):
            mean = torch.from_numpy(np.random.uniform(size=3)).to(places, non_blocking=True)
            # A random precision matrix: the component has any direction, and extends over about a quarter of each axis.
            factor = torch.from_numpy(np.random.normal(scale=4.0, size=(3, 3))).to(places, non_blocking=True)
            density += np.random.uniform(0.5, 1.0) * torch.exp(-0.5 * ((places - mean) @ factor).square().sum(-1))
        count = round(float(np.random.beta(self.alpha, self.alpha)) * density.numel())
        mask = torch.zeros(density.numel(), dtype=torch.bool, device=device)
        mask[density.flatten().topk(count).indices] = True
        return mask.view(shape)


def check_boxes(cfg: Config, height: int, width: int) -> None:
    """UserError if no whole number of pixels lies in the range of cutmix_minmax, from which timm draws a side."""
    if cfg.cutmix_minmax is None:
        return
    low, high = cfg.cutmix_minmax
    for side in (height, width):
        if int(side * low) >= int(side * high):
            raise UserError(
                f"cutmix_minmax: [{low:g}, {high:g}] of {side} pixels holds no side of a box; widen it, as [0.2, 0.8]"
            )


def build_mixup(cfg: Config, epoch: int = 0) -> Mixing | None:
    """timm's Mixup (mixup, cutmix and label smoothing in one) or EventMix, if the settings ask for one in `epoch`."""
    if 0 < cfg.mixup_off_epoch <= epoch:
        return None
    if cfg.event_mix > 0 and dataset_facts(cfg.dataset).events:
        return EventMix(cfg.event_mix, cfg.num_classes, cfg.smoothing)
    if not cfg.mixes:
        return None
    mixup = Mixup(
        mixup_alpha=cfg.mixup,
        cutmix_alpha=cfg.cutmix,
        cutmix_minmax=cfg.cutmix_minmax,
        prob=cfg.mixup_prob,
        switch_prob=cfg.mixup_switch_prob,
        mode=cfg.mixup_mode,
        label_smoothing=cfg.smoothing,
        num_classes=cfg.num_classes,
    )
    return VideoMixup(mixup) if dataset_facts(cfg.dataset).events else mixup
