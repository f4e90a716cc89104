"""The training loop: what one step does, and an epoch of steps.

Legend: T time steps, B batch, C channels, H x W image.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from utils.config.settings import Config
from utils.data.mixing import Mixing, build_mixup
from utils.errors import NonFiniteError
from utils.run.distributed import Process
from utils.run.hooks import ForwardHook, hooked
from utils.run.precision import MOST_SKIPPED_UPDATES, Precision
from utils.run.reproduce import seed_step
from utils.train.losses import make_train_loss
from utils.train.optim import set_rate_of_step
from utils.train.run_state import RunState
from utils.train.teacher import StoredLogits, Teacher


class EpochSums:
    """What one process has summed up in an epoch so far.

    The sum of losses stays on the device: reading it at each step would make the host wait.
    """

    def __init__(self, device: torch.device, steps: int = 0, loss_sum: float = 0.0, samples: int = 0) -> None:
        self.steps = steps
        self.loss_sum = torch.tensor(loss_sum, dtype=torch.float64, device=device)
        self.samples = samples

    def add(self, loss: Tensor, samples: int) -> None:
        self.loss_sum += loss.detach().double() * samples
        self.samples += samples
        self.steps += 1

    def mean_loss(self) -> float:
        """Mean loss of this process's samples; waits for the device."""
        return float(self.loss_sum) / self.samples


@dataclass(frozen=True)
class TrainResult:
    """One epoch of training: the mean loss over all samples and processes, and the speed of all processes."""

    loss: float
    images_per_second: float


@dataclass
class TrainStep:
    """How one batch is trained on.

    Attributes:
        model: called as `model(x) -> (logits, hook)`.
        loss_fn: the training loss on logits and (mixed) targets.
        mixup: mixes a batch on the device, or None.
        accumulate: batches per update; their gradients are averaged.
        frozen: modules that stay in evaluation mode.
        seed: called with the step's number before anything random happens in it.
        set_rate: called with the number of the first step of each group of batches, to set its learning rate.
        teacher: whom the model learns from; `loss_fn` is then a `DistillationLoss`.
        after_update: called after each update, for the moving average of the weights.
    """

    model: nn.Module
    loss_fn: nn.Module
    optimizer: Optimizer
    precision: Precision
    mixup: Mixing | None = None
    accumulate: int = 1
    frozen: Sequence[nn.Module] = ()
    seed: Callable[[int], None] | None = None
    set_rate: Callable[[int], None] | None = None
    teacher: Teacher | None = None
    after_update: Callable[[], None] | None = None
    _earlier: Callable[[], bool] | None = field(default=None, init=False)

    def run(self, x: Tensor, y: Tensor, step: int, last_step: int) -> Tensor:
        """Forward, backward and, when its group of batches is complete, the update; the batch's mean loss.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; raised before the update, with the step and the first
                module whose output is not finite. With loss scaling, which skips such an update and uses a smaller
                scale, it is raised only after so many skipped updates that no scale can help.
        """
        if self.seed is not None:
            self.seed(step)
        if isinstance(self.teacher, StoredLogits):
            y = self.teacher.take_numbers(y)
        if self.mixup is not None:
            x, y = self.mixup(x, y)
        first = step - step % self.accumulate
        if step == first and self.set_rate is not None:
            self.set_rate(step)
        group = min(self.accumulate, last_step + 1 - first)  # the last group of an epoch may be smaller
        updates = step + 1 == first + group
        # Between updates, the processes need not exchange gradients.
        with _without_exchange(self.model) if not updates else contextlib.nullcontext():
            with self.precision.autocast():
                logits, _ = self.model(x)
                loss = self._loss(logits, y) if self.teacher is None else self._taught(logits, y, self.teacher(x))
            is_finite = _read_later(torch.isfinite(loss.detach()))
            self.precision.backward(loss / group)
        if not is_finite():
            what = f"the loss is {float(loss.detach())} in step {step}"
            raise self._not_finite(what, x, otherwise="the loss function itself overflows")
        if updates:
            if not self.precision.scaler.is_enabled():
                self._check_gradients(x, step)
            self.precision.update(self.optimizer, self.model)
            if self.precision.scaler.is_enabled():
                self._check_skipped_updates(x, step)
            if self.after_update is not None:
                self.after_update()
        return loss

    def _loss(self, logits: Tensor | tuple[Tensor, ...], y: Tensor) -> Tensor:
        """The loss of the logits; of several heads the mean of their losses."""
        heads = logits if isinstance(logits, tuple) else (logits,)
        losses = [self.loss_fn(head.float() if self.precision.enabled else head, y) for head in heads]
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def _taught(self, logits: Tensor | tuple[Tensor, ...], y: Tensor, teacher: Tensor) -> Tensor:
        """The loss with a teacher's logits `[B, K]`."""
        if self.precision.enabled:
            teacher = teacher.float()
            logits = tuple(head.float() for head in logits) if isinstance(logits, tuple) else logits.float()
        loss: Tensor = self.loss_fn(logits, y, teacher)
        return loss

    def _check_gradients(self, x: Tensor, step: int) -> None:
        """A spiking neuron does not fire on NaN, so the loss may be finite where a gradient is not.

        On CUDA the result is read one step later: waiting for it would leave the device idle in every step. A state
        that is not finite is never saved.
        """
        gradients = {name: p.grad for name, p in _unwrapped(self.model).named_parameters() if p.grad is not None}
        # One norm over all of them; it overflows only where the update would be useless as well.
        if self._answer(torch.isfinite(torch.nn.utils.get_total_norm(gradients.values()))):
            return
        if x.is_cuda:
            raise NonFiniteError(f"a gradient was not finite in the update before step {step}")
        bad = next((n for n, g in gradients.items() if not bool(torch.isfinite(g).all())), "all parameters together")
        raise self._not_finite(f"the gradient of {bad} is not finite in step {step}, while the loss is", x)

    def _check_skipped_updates(self, x: Tensor, step: int) -> None:
        """End a run in which loss scaling would skip all further updates; on CUDA one step later, as above."""
        if not self._answer(self.precision.skipped_updates < MOST_SKIPPED_UPDATES):
            what = f"the gradients were not finite in {MOST_SKIPPED_UPDATES} updates in a row by step {step}"
            raise self._not_finite(f"{what}, and no smaller loss scale can help", x)

    def _answer(self, flag: Tensor) -> bool:
        """The value of a flag; on CUDA that of the step before, so that the host need not wait."""
        present = _read_later(flag)
        if not flag.is_cuda:
            return present()
        earlier, self._earlier = self._earlier, present
        return earlier is None or earlier()

    def _not_finite(self, what: str, x: Tensor, otherwise: str = "it overflows in the backward pass") -> NonFiniteError:
        where = _first_nonfinite_module(self.model, x, self.precision) or otherwise
        return NonFiniteError(f"{what}; {where}; the weights were not updated")


def make_step(
    cfg: Config,
    epoch: int,
    model: nn.Module,
    state: RunState,
    frozen: Sequence[nn.Module],
    process: Process,
    steps: int = 1,
    teacher: Teacher | None = None,
) -> TrainStep:
    """How the `steps` batches of `epoch` are trained on; `model` is that of `state`, perhaps in wrappers."""
    mixup = build_mixup(cfg, epoch)
    ema = state.ema
    return TrainStep(
        model,
        make_train_loss(cfg, mixup_active=mixup is not None).to(process.device),
        state.optimizer,
        state.precision,
        mixup=mixup,
        accumulate=cfg.grad_accum_steps,
        frozen=frozen,
        seed=functools.partial(seed_step, cfg.seed, epoch, rank=process.rank),
        set_rate=functools.partial(set_rate_of_step, state.schedule, epoch, steps),
        teacher=teacher,
        after_update=None if ema is None else functools.partial(ema.update, state.model),
    )


def _without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def train_one_epoch(
    step: TrainStep,
    loader: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    process: Process,
    *,
    sums: EpochSums | None = None,
    on_step: Callable[[EpochSums], None] | None = None,
) -> TrainResult:
    """Train on every batch of `loader` once.

    Args:
        step: how a batch is trained on.
        loader: batches of images `[B, C, H, W]` or event frames `[B, T, C, H, W]`, and labels `[B]`, on the device.
        steps: batches of a whole epoch.
        sums: of the steps done before, when `loader` starts in the middle of the epoch.
        on_step: called with the sums after each step; may raise, to stop between two steps.

    Raises:
        NonFiniteError: see `TrainStep.run`.
    """
    sums = sums or EpochSums(process.device)
    step.model.train()
    for module in step.frozen:
        module.eval()
    started, already = time.perf_counter(), sums.samples
    for x, y in loader:
        loss = step.run(x, y, sums.steps, steps - 1)
        sums.add(loss, len(x))
        if on_step is not None:
            on_step(sums)
    loss_sum, samples, here = process.sum(float(sums.loss_sum), sums.samples, sums.samples - already)
    return TrainResult(loss_sum / samples, here / (time.perf_counter() - started))


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


def _unwrapped(model: nn.Module) -> nn.Module:
    for wrapper in ("module", "_orig_mod"):  # data-parallel training, torch.compile
        model = getattr(model, wrapper, model)
    return model


@torch.no_grad()
def _first_nonfinite_module(model: nn.Module, x: Tensor, precision: Precision) -> str:
    """The first module, in order of execution, whose output is not finite, in words; empty if there is none."""
    if not bool(torch.isfinite(x).all()):
        return "the input batch itself is not finite"
    found: list[str] = []

    def watch(name: str) -> ForwardHook:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    model = _unwrapped(model)
    with hooked({name: module for name, module in model.named_modules() if name}, watch), precision.autocast():
        model(x)
    return f"the first output that is not finite is that of {found[0]}" if found else ""
