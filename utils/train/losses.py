"""The training losses, chosen as in the published runs, and TET.

Legend: T time steps, B batch, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from utils.config.settings import Config


class TETLoss(nn.Module):
    """Temporal efficient training (Deng et al., ICLR 2022, equation 9).

    (1 - lamb) * mean over t of criterion(logits[t], target) + lamb * MSE(logits, means)

    Args:
        criterion: the loss of one time step, `([B, K], target) -> scalar`.
        means: the value that the regularisation moves all logits to.
        lamb: its weight, 0 to 1.

    Shape: logits `[T, B, K]`, target as `criterion` takes it -> scalar.
    """

    def __init__(self, criterion: nn.Module, means: float = 1.0, lamb: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= lamb <= 1.0:
            raise ValueError(f"TET_lamb={lamb} must lie between 0 and 1")
        self.criterion = criterion
        self.means = means
        self.lamb = lamb

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        per_step = sum(self.criterion(step, target) for step in logits) / logits.shape[0]
        regularisation = F.mse_loss(logits, logits.new_full((), self.means).expand_as(logits))
        return (1.0 - self.lamb) * per_step + self.lamb * regularisation


def make_train_loss(cfg: Config, mixup_active: bool) -> nn.Module:
    """The loss of the settings: JSD with augmentation splits; soft targets (or BCE) with mixup, which does the label
    smoothing itself; else label smoothing (or BCE); else cross entropy. With TET, at each time step."""
    criterion: nn.Module
    if cfg.jsd:
        criterion = JsdCrossEntropy(num_splits=cfg.aug_splits, smoothing=cfg.smoothing)
    elif cfg.bce_loss:
        # With mixup the targets are soft and smoothed already.
        smoothing = 0.0 if mixup_active else cfg.smoothing
        criterion = BinaryCrossEntropy(smoothing=smoothing, target_threshold=cfg.bce_target_thresh)
    elif mixup_active:
        criterion = SoftTargetCrossEntropy()
    elif cfg.smoothing:
        criterion = LabelSmoothingCrossEntropy(smoothing=cfg.smoothing)
    else:
        criterion = nn.CrossEntropyLoss()
    return TETLoss(criterion, cfg.TET_means, cfg.TET_lamb) if cfg.TET else criterion
