"""One training run: what it is built from, and what happens in each epoch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.config.settings import Config
from utils.data.batch_picture import save_batch
from utils.data.device_loader import Batch
from utils.data.loaders import build_loaders
from utils.errors import NonFiniteError, UserError, first_line
from utils.measure.firing import FiringRecorder, spike_sources
from utils.run.build import (
    build_model,
    for_evaluation,
    layout_of,
    parameter_count,
    parts_in_words,
    prepare_for_training,
    sizes_in_words,
    with_sizes_of,
)
from utils.run.console import Progress, clock, logger, peak_memory
from utils.run.distributed import Process, keep_gradient_strides
from utils.run.evaluation import EvalResult, evaluate
from utils.run.memory import refuse_what_does_not_fit
from utils.run.precision import Precision
from utils.run.reproduce import seed_step, set_deterministic
from utils.train.checkpoint_store import BEST, LAST, RECOVERY, CheckpointStore
from utils.train.cuda_graph import WARM_UP, why_not
from utils.train.curves import drawn
from utils.train.optim import learning_rate, make_optimizer, make_schedule, peak_learning_rate, set_learning_rate
from utils.train.recovery import Recovery
from utils.train.run_files import RunLog
from utils.train.run_state import RunState
from utils.train.step import EpochSums, TrainResult, TrainStep, make_step, train_one_epoch
from utils.train.teacher import ModelTeacher, StoredLogits, make_teacher

_SHOWN_SAMPLES = 16


@functools.cache
def _try_compiler() -> None:
    """Compile one multiplication: torch would say only in the first step what it lacks, and then in many lines.

    The factor is another one each time, so that no stored result hides a compiler that is gone.
    """
    factor = random.SystemRandom().random()  # the run's own random numbers are not touched
    try:
        torch.compile(lambda x: x * factor)(torch.ones(4))
    except RuntimeError as error:
        raise UserError(
            f"compile: torch.compile does not work here ({first_line(error)}); install a C++ compiler, such as g++, "
            "set CXX to its path, or leave compile out"
        ) from error


def _compiled(model: nn.Module) -> nn.Module:
    _try_compiler()
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


def parallel(model: nn.Module, device: torch.device, compiles: bool) -> nn.Module:
    """`model` for data-parallel training, compiled around the wrapper if asked for: torch.compile then ends its graphs
    where a bucket of gradients is complete, and their exchange runs beside the rest of the backward pass."""
    keep_gradient_strides(model)
    wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    return _compiled(wrapped) if compiles else wrapped


class Trainer:
    """Builds a run from its configuration, resumes it from a checkpoint, and runs its epochs.

    Args:
        cfg: the configuration.
        process: this process among those of the run.
        folder: where the main process writes.

    Raises:
        UserError: whatever in the configuration, data or checkpoint does not fit.
    """

    def __init__(self, cfg: Config, process: Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        for warning in cfg.warnings:
            logger.warning(f"warning: {warning}")
        if cfg.deterministic and cfg.event_mode and process.device.type == "cuda":
            raise UserError(
                "deterministic: the event mode's 3-D max-pool has no deterministic backward pass on CUDA; leave it "
                "out, or use --device cpu"
            )
        set_deterministic(cfg.deterministic)
        seed_step(cfg.seed)  # the same first weights in every process
        self.need = refuse_what_does_not_fit(cfg, process.device)
        model = build_model(cfg)
        self.cfg = cfg = with_sizes_of(cfg, model)
        precision = Precision(cfg, process.device)
        model, self.frozen = prepare_for_training(cfg, model, process, precision)
        innermost, self._why_layout = layout_of(cfg, model, process.device)
        self.cfg = cfg = dataclasses.replace(cfg, channels_last=innermost)
        # Of the images that the loader gives: a teacher may want other statistics.
        self.teacher = make_teacher(cfg, process, precision)
        stored = self.teacher if isinstance(self.teacher, StoredLogits) else None
        self.loaders = build_loaders(
            cfg, device=process.device, rank=process.rank, world_size=process.world_size, numbered=stored is not None
        )
        if stored is not None:
            stored.check_length(self.loaders.samples)
        # So that the files of the run say which samples it was trained on.
        self.cfg = cfg = dataclasses.replace(cfg, split_hash=self.loaders.split_hash)
        self.steps = len(self.loaders.train)
        optimizer = make_optimizer(cfg, model, process.world_size)
        schedule, self.num_epochs = make_schedule(cfg, optimizer, self.steps)
        ema = None
        if cfg.model_ema:
            device = torch.device("cpu") if cfg.model_ema_force_cpu else None
            ema = ModelEmaV3(model, decay=cfg.model_ema_decay, device=device)
        self.state = RunState(model, optimizer, schedule, precision, ema)
        self.store = CheckpointStore(folder, cfg.checkpoint_hist, decreasing=cfg.eval_metric == "loss")
        self.recovery = Recovery(cfg, process, self.state, self.store)
        self.start_epoch, self.sums = self.recovery.resume() if cfg.resume else (0, None)
        if self.sums is not None and self.sums.steps > self.steps:
            raise UserError(
                f"checkpoint {cfg.resume}: it is in an epoch after step {self.sums.steps}, and an epoch now has "
                f"{self.steps} steps; resume with the data and batch size that it was written with, or from {LAST}"
            )
        if cfg.start_epoch is not None:
            if cfg.start_epoch >= self.num_epochs:
                raise UserError(
                    f"start_epoch: {cfg.start_epoch} leaves nothing of the {self.num_epochs} epochs, which count from "
                    f"0; use {self.num_epochs - 1} or less, or more epochs"
                )
            self.start_epoch, self.sums = cfg.start_epoch, None
            set_learning_rate(schedule, self.start_epoch)
        self.compiled = _compiled(model) if cfg.compile else model
        self.parallel = self.compiled if process.world_size == 1 else parallel(model, process.device, cfg.compile)
        models = [model, *([self.teacher.model] if isinstance(self.teacher, ModelTeacher) else [])]
        self.why_no_graph = why_not(cfg, process.device, process.world_size, models, optimizer)
        self.log: RunLog | None = None
        self._shown: Tensor | None = None
        self._saves_images = cfg.save_images and process.is_main

    def describe(self) -> None:
        """Log what will run, and how."""
        cfg, process = self.cfg, self.process
        _, height, width = self.loaders.data.input_size
        logger.info(
            f"{cfg.model}: {parameter_count(self.state.model):,} parameters, {sizes_in_words(cfg, self.state.model)}"
            f"T = {cfg.time_steps}, {cfg.dataset} at {height} x {width}"
        )
        precision = str(self.state.precision.dtype).removeprefix("torch.") if cfg.amp else "float32"
        precision += " (tf32 in products)" if cfg.allow_tf32 and process.device.type == "cuda" else ""
        scaled = "not scaled with it" if cfg.lr_base is None else f"lr_base {cfg.lr_base:g} scaled with it"
        logger.info(
            f"{process.world_size} process(es) on {process.device.type}, {precision}; global batch "
            f"{cfg.batch_size * process.world_size * cfg.grad_accum_steps}; "
            f"peak learning rate {peak_learning_rate(cfg, process.world_size):g}, {scaled}"
        )
        if advice := self.state.precision.advice():
            logger.info(advice)
        if process.device.type == "cuda":
            order = "innermost" if cfg.channels_last else "before height and width"
            logger.info(f"channels_last: channels {order} in memory: {self._why_layout}")
        if cfg.cuda_graph and self.why_no_graph is None:
            logger.info(f"cuda_graph: from step {WARM_UP + 1} of each epoch on, a step is one CUDA graph")
        elif cfg.cuda_graph:
            logger.warning(f"warning: cuda_graph is off: {self.why_no_graph}")
        logger.info(f"how each part runs:\n{parts_in_words(self.state.model)}")

    @contextlib.contextmanager
    def files(self) -> Iterator[None]:
        """Keep the run's files open, and watch for signals."""
        if self.process.is_main:
            self.log = RunLog(self.folder, self.cfg, self.start_epoch, parts=parts_in_words(self.state.model))
            done = f"nothing left to do: {self.num_epochs} epochs are done"
            left = f"epochs {self.start_epoch + 1} to {self.num_epochs}" if self.epochs_left() else done
            logger.info(f"{left}; files in {self.folder}")
        if self.start_epoch == 0 and self.sums is None:
            # So that there is a checkpoint from the first step on.
            self.recovery.save(0, EpochSums(self.process.device))
        self._started = time.perf_counter()
        try:
            with self.recovery.stop:
                yield
        except NonFiniteError as error:
            good = next((p for p in (self.folder / RECOVERY, self.folder / LAST) if p.exists()), None)
            raise NonFiniteError(f"{error}. The last good state is {good}") from error
        finally:
            if self.log is not None:
                self.log.close()

    def epochs_left(self) -> range:
        return range(self.start_epoch, self.num_epochs)

    def train(self, epoch: int) -> TrainResult:
        """Train one epoch, or the rest of the epoch in which the checkpoint was written."""
        sums, self.sums = self.sums or EpochSums(self.process.device), None
        self.loaders.set_epoch(epoch, start_batch=sums.steps)
        images = self.cfg.batch_size * self.process.world_size
        title = f"epoch {epoch + 1}/{self.num_epochs}"
        with Progress(title, self.steps, images, self.cfg.log_interval, self.process.is_main, sums.steps) as progress:

            def on_step(sums: EpochSums) -> None:
                progress.step(sums.steps, sums.mean_loss)
                # The last step is not saved here: the evaluation begins with one state in all processes.
                if sums.steps < self.steps and sums.steps % self.cfg.grad_accum_steps == 0:
                    self.recovery.between_steps(epoch, sums)

            batches = self._saving_first(self.loaders.train) if self._saves_images else self.loaders.train
            try:
                result = train_one_epoch(
                    self.train_step(epoch), batches, self.steps, self.process, sums=sums, on_step=on_step
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"epoch {epoch + 1}: {error}") from error
        self._finished = sums
        return result

    def _saving_first(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on; the first is also written as a picture."""
        for x, y in batches:
            if self._saves_images:
                self._saves_images = False
                self._picture(x, "training_images.png")
            yield x, y

    def _picture(self, x: Tensor, name: str) -> Path:
        return save_batch(x, self.loaders.data.mean, self.loaders.data.std, self.folder / name)

    def train_step(self, epoch: int) -> TrainStep:
        graphed = self.cfg.cuda_graph and self.why_no_graph is None
        run = (self.cfg, epoch, self.parallel, self.state, self.frozen, self.process)
        return make_step(*run, graphed, self.steps, self.teacher)

    def evaluate(self, epoch: int) -> dict[str, EvalResult]:
        """Results of the trained weights and, where there is one, of their moving average."""
        state, process = self.state, self.process
        if process.world_size > 1:
            # All processes evaluate the running statistics that are saved: rank 0's, or the mean over processes.
            distribute_bn(state.model, process.world_size, reduce=self.cfg.dist_bn == "reduce")
        if state.ema is not None:
            process.broadcast_buffers(state.ema.module)
        # Whatever fails from here to the end of the epoch (a damaged sample, a full disk), its training is kept. Not
        # before: only now all processes have one state.
        self.recovery.save(epoch, self._finished)
        models: dict[str, nn.Module] = {"eval": self.compiled}
        if state.ema is not None:
            models["ema"] = state.ema.module
            if self.cfg.model_ema_force_cpu:
                models["ema"] = copy.deepcopy(state.ema.module).to(process.device)
        if self.cfg.engine != "dense" and not self.cfg.amp:
            # Without amp only: the engine's evaluation is float32, and would measure another network than trained.
            models = {name: for_evaluation(model) for name, model in {**models, "eval": state.model}.items()}
        # Processes may differ by one batch, and all of them must ask together whether to stop.
        common = int(min(process.gather(len(self.loaders.eval))))

        def on_step(done: int) -> None:
            if done <= common and self.recovery.must_stop():
                raise self.recovery.stopped()

        with self.recovery.kept(epoch):
            return {
                name: evaluate(model, self._eval_batches(), state.precision, process, on_step=on_step)
                for name, model in models.items()
            }

    def _eval_batches(self) -> Iterator[Batch]:
        """The evaluation batches; a few samples of the first one are kept, and shown in TensorBoard."""
        for x, y in self.loaders.eval:
            if self._shown is None:
                self._shown = x[:_SHOWN_SAMPLES].clone()
                if self.log is not None:
                    self.log.picture("evaluation images", self._picture(self._shown, "evaluation_images.png"))
            yield x, y

    def finish(self, epoch: int, trained: TrainResult, evaluated: dict[str, EvalResult]) -> None:
        """Log the epoch, set the next learning rate, and write the epoch's checkpoint."""
        lr = learning_rate(self.state.optimizer)
        judged = evaluated.get("ema", evaluated["eval"])
        metric = getattr(judged, self.cfg.eval_metric)
        with self.recovery.kept(epoch):
            if self.log is not None:
                row: dict[str, Any] = {"epoch": epoch, "lr": lr, "train_loss": trained.loss}
                for name, result in evaluated.items():
                    row |= {f"{name}_{key}": getattr(result, key) for key in ("loss", "top1", "top5")}
                # The row first: a resumed run deletes rows that are later than its checkpoint.
                self.log.epoch(row, self._extras(trained, judged))
            set_learning_rate(self.state.schedule, epoch + 1, metric)
        if self.process.is_main:
            self.store.save(self.state.snapshot(self.cfg), epoch, metric)
            done = epoch + 1 - self.start_epoch
            left = (time.perf_counter() - self._started) / done * (self.num_epochs - epoch - 1)
            logger.info(
                f"epoch {epoch + 1}/{self.num_epochs}  lr {lr:.2e}  loss {trained.loss:.4f}  eval loss "
                f"{judged.loss:.4f}  top-1 {judged.top1:.2f}%  top-5 {judged.top5:.2f}%  "
                f"{trained.images_per_second:.0f} images/s  {peak_memory(self.process.device)}  {clock(left)} left"
            )
        if epoch + 1 < self.num_epochs and self.recovery.must_stop():
            raise self.recovery.stopped()

    def _extras(self, trained: TrainResult, judged: EvalResult) -> dict[str, float]:
        """What goes to TensorBoard only: speeds, and the mean firing rates on a few evaluation samples."""
        extras = {
            "speed/train_images_per_second": trained.images_per_second,
            "speed/eval_images_per_second": judged.images_per_second,
        }
        sources = spike_sources(self.state.model)
        if sources and self._shown is not None:
            self.state.model.eval()
            with torch.no_grad(), self.state.precision.autocast(), FiringRecorder(sources) as recorder:
                self.state.model(self._shown)
            rows = recorder.rows(Process(0, 1, self.process.device))
            extras |= {f"firing_rate/{row.name}": row.mean_rate for row in rows}
        return extras

    def conclude(self) -> None:
        """Name the best epoch and draw the curves."""
        if not self.process.is_main or self.store.best is None:
            return
        metric, epoch = self.store.best
        unit = "" if self.cfg.eval_metric == "loss" else "%"
        logger.info(
            f"best {self.cfg.eval_metric}: {metric:.2f}{unit} in epoch {epoch + 1}, {self.folder / BEST}; "
            f"{drawn(self.folder)}"
        )
