"""The evaluation loop, of training and measurement: accuracy and loss over all samples of all processes.

Legend: T time steps, B batch, C channels, H x W image, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.run.distributed import Process
from utils.run.precision import Precision


@dataclass(frozen=True)
class EvalResult:
    """One evaluation; accuracies in percent, the loss is cross entropy."""

    loss: float
    top1: float
    top5: float
    samples: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.samples / self.seconds


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    process: Process,
    *,
    on_step: Callable[[int], None] | None = None,
) -> EvalResult:
    """Cross entropy, top-1 and top-5 over every sample of every process, each sample counted once.

    Logits of each time step `[T, B, K]` (TET) are averaged over T. Counts and losses are summed over all samples and
    divided at the end, so that the result depends neither on the batch size nor on the number of processes.

    Args:
        loader: batches of images `[B, C, H, W]` or event frames `[B, T, C, H, W]`, and labels `[B]`, on the device.
        on_step: called after each batch with the number of batches done; may raise, to stop.
    """
    model.eval()
    started = time.perf_counter()
    loss_sum = torch.zeros((), dtype=torch.float64, device=process.device)
    correct = torch.zeros(2, dtype=torch.float64, device=process.device)  # top-1, top-5
    samples = 0
    for step, (x, y) in enumerate(loader):
        with precision.autocast():
            logits, _ = model(x)
        if logits.dim() == 3:
            logits = logits.mean(dim=0)  # [B, K]
        loss_sum += F.cross_entropy(logits.double(), y, reduction="sum")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        hits = ranked == y.unsqueeze(1)
        correct += torch.stack([hits[:, :1].sum(), hits.sum()])
        samples += len(x)
        if on_step is not None:
            on_step(step + 1)
    loss, top1, top5, count = process.sum(float(loss_sum), *correct.tolist(), samples)
    seconds = time.perf_counter() - started
    return EvalResult(loss / count, 100.0 * top1 / count, 100.0 * top5 / count, int(count), seconds)
