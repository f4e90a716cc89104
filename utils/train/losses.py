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


class DistillationLoss(nn.Module):
    """(1 - alpha) * base(logits, target) + alpha * extra(logits, teacher), as published for V2 (after DeiT: Touvron et
    al., ICML 2021).

    The extra term is, for `hard`, the cross entropy against the teacher's most likely class; for `soft`, the
    Kullback-Leibler divergence of the student from the teacher at temperature tau, summed over the batch and classes,
    times tau^2 over the number of logits. A model with two heads learns the labels with the first one and the teacher
    with the second one; a model with one head learns both with it.

    Args:
        base: the loss without a teacher.
        kind: `hard` or `soft`.
        alpha: weight of the teacher, 0 to 1.
        tau: temperature of `soft`.

    Shape: logits `[B, K]` or a pair of them (`[T, B, K]` with TET), target as `base` takes it, teacher `[B, K]` ->
    scalar.
    """

    def __init__(self, base: nn.Module, kind: str, alpha: float = 0.5, tau: float = 1.0) -> None:
        super().__init__()
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau

    def forward(self, logits: Tensor | tuple[Tensor, ...], target: Tensor, teacher: Tensor) -> Tensor:
        first, second = logits if isinstance(logits, tuple) else (logits, logits)
        loss: Tensor = (1.0 - self.alpha) * self.base(first, target)
        # TET is about the labels; the teacher knows no time steps.
        return loss + self.alpha * self._extra(second.mean(dim=0) if second.dim() == 3 else second, teacher)

    def _extra(self, logits: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(logits, teacher.argmax(dim=1))
        student, known = (F.log_softmax(x / self.tau, dim=1) for x in (logits, teacher))
        return F.kl_div(student, known, reduction="sum", log_target=True) * self.tau**2 / logits.numel()


def make_train_loss(cfg: Config, mixup_active: bool) -> nn.Module:
    """The loss of the settings: JSD with augmentation splits; soft targets (or BCE) with mixup, which does the label
    smoothing itself; else label smoothing (or BCE); else cross entropy. With TET, at each time step. With kd, a
    `DistillationLoss` around it."""
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
    if cfg.TET:
        criterion = TETLoss(criterion, cfg.TET_means, cfg.TET_lamb)
    return criterion if cfg.kd == "none" else DistillationLoss(criterion, cfg.kd, cfg.kd_alpha, cfg.kd_tau)
