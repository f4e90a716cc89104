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
from utils.run.precision import MOST_SKIPPED_UPDATES, Precision, leaves_updates_out
from utils.run.reproduce import seed_step
from utils.train.cuda_graph import StepGraph
from utils.train.finite import first_nonfinite_module, read_later, unwrapped
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
        graphed: whether steps run as one CUDA graph each (utils/train/cuda_graph.py says where they can).
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
    graphed: bool = False
    graph: StepGraph | None = field(default=None, init=False)
    _waiting: tuple[Callable[[], list[bool]], Tensor, int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.graphed:
            self.graph = StepGraph(self.compute, self.optimizer)

    def run(self, x: Tensor, y: Tensor, step: int, last_step: int) -> Tensor:
        """Forward, backward and, when its group of batches is complete, the update; the batch's mean loss.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; raised before the update, with the step and the first
                module whose output is not finite. With loss scaling, which skips such an update and uses a smaller
                scale, it is raised only after so many skipped updates that no scale can help. On CUDA it is raised one
                step later, since waiting for the device in each step would leave it idle.
        """
        if self.seed is not None:
            self.seed(step)
        if self.mixup is not None:
            x, y = self.mixup(x, y)
        first = step - step % self.accumulate
        if step == first and self.set_rate is not None:
            self.set_rate(step)
        group = min(self.accumulate, last_step + 1 - first)  # the last group of an epoch may be smaller
        updates = step + 1 == first + group
        loss, finite = self.graph(x, y) if self.graph is not None else self.compute(x, y, group, updates)
        self._check(loss, finite, x, step)
        if updates and self.after_update is not None:
            self.after_update()
        return loss

    def compute(self, x: Tensor, y: Tensor, group: int = 1, updates: bool = True) -> tuple[Tensor, Tensor]:
        """Forward pass, loss, backward pass and, if asked for, the update; on CUDA the host never waits for it.

        Args:
            x, y: images or frames, and targets, mixed already.
            group: batches per update.
            updates: whether this is the last one of them.

        Returns:
            The loss, and two flags `[2]`: whether it is finite, and whether the gradients are (with loss scaling,
            whether an update still succeeds now and then). Where one is false, there was no update; but on CUDA,
            optimizers that cannot leave one out by a flag on the device have made it.
        """
        # Between updates, the processes need not exchange gradients.
        with _without_exchange(self.model) if not updates else contextlib.nullcontext():
            with self.precision.autocast():
                logits, _ = self.model(x)
                loss = self._loss(logits, y) if self.teacher is None else self._taught(logits, y, self.teacher(x, y))
            self.precision.backward(loss / group if group > 1 else loss)
        loss = loss.detach()
        finite = sound = torch.isfinite(loss)
        if updates:
            scaled = self.precision.scaler.is_enabled()
            if not scaled:
                # A spiking neuron does not fire on NaN, so the loss may be finite where a gradient is not. One norm
                # over all of them; it overflows only where the update would be useless as well.
                gradients = [p.grad for p in unwrapped(self.model).parameters() if p.grad is not None]
                sound = torch.isfinite(torch.nn.utils.get_total_norm(gradients))
            both = finite & sound
            if both.is_cuda or bool(both):
                self.precision.update(self.optimizer, self.model, both)
            if scaled:
                sound = self.precision.skipped_updates < MOST_SKIPPED_UPDATES
        return loss, torch.stack((finite, sound))

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
        labels = y[:, 0] if isinstance(self.teacher, StoredLogits) else y
        loss: Tensor = self.loss_fn(logits, labels, teacher)
        return loss

    def finish(self) -> None:
        """Read the flags of the last step, for which there is no later one.

        Raises:
            NonFiniteError: as `run`.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            finite, x, step = waiting
            self._judge(finite(), None, x, step)

    def _check(self, loss: Tensor, finite: Tensor, x: Tensor, step: int) -> None:
        """Judge the flags of this step; on CUDA those of the step before, whose copy has arrived by now."""
        if not finite.is_cuda:
            self._judge(finite.tolist(), loss, x, step)
            return
        present = (read_later(finite), x, step)
        self.finish()
        self._waiting = present

    def _judge(self, finite: list[bool], loss: Tensor | None, x: Tensor, step: int) -> None:
        if all(finite):
            return
        otherwise = "it overflows in the backward pass"
        if not finite[0]:
            what = f"the loss is {'not finite' if loss is None else float(loss)} in step {step}"
            otherwise = "the loss function itself overflows"
        elif self.precision.scaler.is_enabled():
            what = f"the gradients were not finite in {MOST_SKIPPED_UPDATES} updates in a row by step {step}"
            what += ", and no smaller loss scale can help"
        else:
            # On CUDA they are gone: the update was made on the device, or left out there.
            gradients = {n: p.grad for n, p in unwrapped(self.model).named_parameters() if p.grad is not None}
            bad = [name for name, g in gradients.items() if loss is not None and not bool(torch.isfinite(g).all())]
            which = f"the gradient of {bad[0]}" if bad else "a gradient, or the norm of all together,"
            what = f"{which} is not finite in step {step}, while the loss is"
        where = first_nonfinite_module(self.model, x, self.precision) or otherwise
        kept = not x.is_cuda or leaves_updates_out(self.optimizer) or self.precision.scaler.is_enabled()
        end = "the weights were not updated" if kept else "the weights were updated with it"
        raise NonFiniteError(f"{what}; {where}; {end}")


def make_step(
    cfg: Config,
    epoch: int,
    model: nn.Module,
    state: RunState,
    frozen: Sequence[nn.Module],
    process: Process,
    graphed: bool = False,
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
        graphed=graphed,
    )


def _without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
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
    step.finish()
    loss_sum, samples, here = process.sum(float(sums.loss_sum), sums.samples, sums.samples - already)
    return TrainResult(loss_sum / samples, here / (time.perf_counter() - started))
