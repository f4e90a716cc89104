"""The one training loop and the one evaluation loop, used by both scripts.

Legend: T time steps, B batch, C channels, H x W image, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.distributed import Process
from utils.precision import Precision

# Called after each step with (steps done, loss of the steps so far averaged on demand).
OnStep = Callable[[int, Callable[[], float]], None]


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; raised before the update that it would have spoiled."""


@dataclass(frozen=True)
class TrainResult:
    """One epoch of training, over all batches and processes."""

    loss: float
    samples: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.samples / self.seconds


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


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    loss_fn: nn.Module,
    optimizer: Optimizer,
    precision: Precision,
    process: Process,
    *,
    epoch: int,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    after_update: Callable[[], None] | None = None,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train on every batch of `loader` once.

    Args:
        model: called as `model(x) -> (logits, hook)`.
        loader: batches of images `[B, C, H, W]` or event frames `[B, T, C, H, W]`, and labels `[B]`.
        loss_fn: the training loss on logits and (mixed) targets.
        mixup: mixes a batch on the device, or None.
        after_update: called after each update, for the moving average of the weights.
        on_step: called after each step, for progress.

    Raises:
        NonFiniteLossError: with epoch, step and the first module whose output is not finite; before the update.
    """
    model.train()
    started = time.perf_counter()
    # Sums stay on the device: reading them at each step would make the host wait for it.
    loss_sum = torch.zeros((), dtype=torch.float64, device=process.device)
    samples = 0
    for step, (x, y) in enumerate(loader):
        x, y = _to_device(x, process.device, memory_format), y.to(process.device, non_blocking=True)
        if mixup is not None:
            x, y = mixup(x, y)
        with precision.autocast():
            logits, _ = model(x)
            loss = loss_fn(logits.float() if precision.enabled else logits, y)
        finite = _read_later(torch.isfinite(loss.detach()))
        precision.backward(loss)
        if not finite():
            raise NonFiniteLossError(
                f"the loss is {float(loss.detach())} in epoch {epoch}, step {step}; "
                f"{_first_nonfinite_module(model, x, precision)}. The weights were not updated."
            )
        precision.update(optimizer, model)
        if after_update is not None:
            after_update()
        loss_sum += loss.detach().double() * len(x)
        samples += len(x)
        if on_step is not None:
            on_step(step + 1, lambda total=loss_sum, n=samples: float(total) / n)  # type: ignore[misc]
    all_loss, all_samples = process.sum(float(loss_sum), samples)
    return TrainResult(all_loss / all_samples, int(all_samples), time.perf_counter() - started)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    process: Process,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    on_step: Callable[[int], None] | None = None,
) -> EvalResult:
    """Cross entropy, top-1 and top-5 over every sample of every process, each sample counted once.

    Per-step logits `[T, B, K]` (TET) are averaged over T. Sums are integers, or float64 for the loss, and are
    divided once, so that neither the batch size nor the number of processes matters.
    """
    model.eval()
    started = time.perf_counter()
    loss_sum = torch.zeros((), dtype=torch.float64, device=process.device)
    correct = torch.zeros(2, dtype=torch.float64, device=process.device)  # top-1, top-5
    samples = 0
    for step, (x, y) in enumerate(loader):
        x, y = _to_device(x, process.device, memory_format), y.to(process.device, non_blocking=True)
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
    return EvalResult(
        loss / count, 100.0 * top1 / count, 100.0 * top5 / count, int(count), time.perf_counter() - started
    )


def _to_device(x: Tensor, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    x = x.to(device, non_blocking=True)
    # Event frames are 5-D and become 4-D inside the model: channels-last has no meaning for them here.
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


def _read_later(flag: Tensor) -> Callable[[], bool]:
    """Start copying a boolean to the host now, read it when called.

    On CUDA the copy is done as soon as the forward pass is, so reading it after the backward pass was queued
    does not leave the device idle.
    """
    if not flag.is_cuda:
        return lambda: bool(flag)
    host = flag.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(host)

    return read


@torch.no_grad()
def _first_nonfinite_module(model: nn.Module, x: Tensor, precision: Precision) -> str:
    """Name the first module, in order of execution, whose output is not finite."""
    if not bool(torch.isfinite(x).all()):
        return "the input batch itself is not finite"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    inner = getattr(model, "module", model)
    handles = [m.register_forward_hook(watch(name)) for name, m in inner.named_modules() if name]
    try:
        with precision.autocast():
            inner(x)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the first output that is not finite is that of {found[0]}"
    return "all module outputs are finite, so the loss function itself overflows on them"
