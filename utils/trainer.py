"""One training run: everything it is built from, and what happens around each epoch."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import convert_splitbn_model
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint
from utils.build import build_model, parameter_count, with_sizes_of
from utils.checkpoint import CheckpointStore
from utils.config import to_yaml
from utils.distributed import Process
from utils.engine import EvalResult, TrainResult, evaluate, train_one_epoch
from utils.errors import UserError
from utils.figures import draw_curves
from utils.loaders import build_loaders
from utils.losses import make_train_loss
from utils.optim import learning_rate, make_optimizer, make_schedule
from utils.precision import Precision
from utils.reproduce import git_commit, seed_epoch, set_deterministic, versions
from utils.runlog import Progress, RunLog, clock, logger

if TYPE_CHECKING:
    from utils.settings import Config

# May differ between a run and its continuation without a word.
_FREE_ON_RESUME = {
    *("resume", "no_resume_opt", "experiment", "output"),
    *("workers", "pin_mem", "log_interval", "local_rank"),
}


class Trainer:
    """Builds a run from its configuration, continues it from a checkpoint, and runs its epochs.

    Args:
        cfg: the configuration.
        process: this process among those of the run.
        folder: where the main process writes.

    Raises:
        UserError: whatever in the configuration, data or checkpoint does not fit.
    """

    def __init__(self, cfg: Config, process: Process, folder: Path) -> None:
        self.cfg = cfg
        self.process = process
        self.folder = folder
        for warning in cfg.warnings:
            logger.warning(f"warning: {warning}")
        set_deterministic(cfg.deterministic)
        # The same weights on every process, and the same as on one.
        seed_epoch(cfg.seed, epoch=0)
        self.model = self._build_model()
        self.cfg = cfg = with_sizes_of(cfg, self.model)
        self.memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.loaders = build_loaders(cfg, device=process.device, rank=process.rank, world_size=process.world_size)
        self.precision = Precision(cfg, process.device)
        self.optimizer = make_optimizer(cfg, self.model)
        self.schedule, self.num_epochs = make_schedule(cfg, self.optimizer)
        self.store = CheckpointStore(folder, cfg.checkpoint_hist, decreasing=cfg.eval_metric == "loss")
        self.start_epoch = self._resume() if cfg.resume else 0
        if cfg.start_epoch is not None:
            self.start_epoch = cfg.start_epoch
            if self.schedule is not None:
                self.schedule.step(self.start_epoch)
        self.ema = self._build_ema()
        self.parallel = self._parallel(self.model)
        self.log: RunLog | None = None

    def _build_model(self) -> nn.Module:
        cfg = self.cfg
        model = build_model(cfg)
        if cfg.initial_checkpoint:
            checkpoint.load_weights(model, cfg.initial_checkpoint)
        if cfg.split_bn:
            model = convert_splitbn_model(model, cfg.aug_splits)
        if cfg.sync_bn:
            if self.process.device.type != "cuda":
                raise UserError("sync_bn needs CUDA devices; leave it out on a CPU")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(self.process.device)
        if cfg.channels_last:
            model.to(memory_format=torch.channels_last)
        return model

    def _build_ema(self) -> ModelEmaV3 | None:
        if not self.cfg.model_ema:
            return None
        device = torch.device("cpu") if self.cfg.model_ema_force_cpu else None
        ema = ModelEmaV3(self.model, decay=self.cfg.model_ema_decay, device=device)
        if self._ema_weights is not None:
            ema.module.load_state_dict(self._ema_weights)
        return ema

    _ema_weights: dict[str, Any] | None = None

    def _parallel(self, model: nn.Module) -> nn.Module:
        if self.process.world_size == 1:
            return model
        ids = [self.process.device.index] if self.process.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def _resume(self) -> int:
        """Load weights and, unless told otherwise, the state of the loop; the epoch to go on with."""
        cfg = self.cfg
        content = checkpoint.load_weights(self.model, cfg.resume)
        self._ema_weights = content.get("state_dict_ema")
        if cfg.no_resume_opt:
            logger.info(f"weights of {cfg.resume}, without optimizer and epoch")
            return 0
        if "optimizer" not in content or "epoch" not in content:
            raise UserError(
                f"checkpoint {cfg.resume} holds weights only, no optimizer and epoch to go on with; "
                "add --no-resume-opt, or start from it with --initial-checkpoint"
            )
        then = content.get("config", {})
        differences = [
            f"{key}: {then[key]!r} then, {value!r} now"
            for key, value in cfg.as_dict().items()
            if key in then and key not in _FREE_ON_RESUME and then[key] != value
        ]
        if differences:
            logger.warning("warning: settings differ from the checkpoint's: " + "; ".join(differences))
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(
                f"checkpoint {cfg.resume}: its optimizer state does not fit opt={cfg.opt!r} ({error}); "
                "resume with the same optimizer or add --no-resume-opt"
            ) from error
        self.precision.load_state_dict(content.get("amp_scaler", {}))
        if self.schedule is not None and "schedule" in content:
            self.schedule.load_state_dict(content["schedule"])
        self.store.resume(content)
        logger.info(f"resumed {cfg.resume} after epoch {content['epoch']}")
        return int(content["epoch"]) + 1

    def describe(self) -> None:
        """Log what is about to run."""
        cfg, process = self.cfg, self.process
        _, height, width = self.loaders.data.input_size
        logger.info(
            f"{cfg.model}: {parameter_count(self.model):,} parameters, {cfg.layer} blocks, D = {cfg.dim}, "
            f"T = {cfg.time_steps}, {cfg.spike_mode} neurons, {cfg.dataset} at {height} x {width}"
        )
        precision = str(self.precision.dtype).removeprefix("torch.") if cfg.amp else "float32"
        logger.info(
            f"{process.world_size} process(es) on {process.device.type}, {precision}; global batch "
            f"{cfg.batch_size * process.world_size}; peak learning rate {cfg.lr:g}, not scaled with it"
        )
        logger.info(f"epochs {self.start_epoch} to {self.num_epochs - 1}; files in {self.folder}")

    @contextlib.contextmanager
    def files(self) -> Iterator[None]:
        """Keep the run's files open; an interruption says how to go on."""
        if self.process.is_main:
            self.log = RunLog(self.folder, to_yaml(self.cfg), self.start_epoch)
        self._started = time.perf_counter()
        try:
            yield
        except KeyboardInterrupt:
            last = self.folder / checkpoint.LAST
            logger.info(f"interrupted; {f'go on with --resume {last}' if last.exists() else 'no epoch done'}")
            raise
        finally:
            if self.log is not None:
                self.log.close()

    def epochs_left(self) -> range:
        if self.start_epoch >= self.num_epochs:
            logger.info(f"nothing left to do: {self.num_epochs} epochs are done")
        return range(self.start_epoch, self.num_epochs)

    def train(self, epoch: int) -> TrainResult:
        cfg = self.cfg
        seed_epoch(cfg.seed, epoch, self.process.rank)
        self.loaders.set_epoch(epoch)
        mixing = not cfg.mixup_off_epoch or epoch < cfg.mixup_off_epoch
        mixup = self.loaders.mixup if mixing else None
        steps = len(self.loaders.train)
        images = cfg.batch_size * self.process.world_size
        progress = Progress(f"epoch {epoch + 1}", steps, images, cfg.log_interval, self.process.is_main)
        ema = self.ema
        try:
            return train_one_epoch(
                self.parallel,
                self.loaders.train,
                make_train_loss(cfg, mixup_active=mixup is not None).to(self.process.device),
                self.optimizer,
                self.precision,
                self.process,
                epoch=epoch,
                mixup=mixup,
                memory_format=self.memory_format,
                after_update=None if ema is None else (lambda: ema.update(self.model)),
                on_step=progress.step,
            )
        finally:
            progress.close()

    def evaluate(self, epoch: int) -> dict[str, EvalResult]:
        """Results of the trained weights and, where there is one, of their moving average."""
        if self.process.world_size > 1:
            # All processes evaluate the statistics that are saved: rank 0's, or the mean over ranks.
            distribute_bn(self.model, self.process.world_size, reduce=self.cfg.dist_bn == "reduce")
            if self.ema is not None:
                distribute_bn(self.ema.module, self.process.world_size, reduce=self.cfg.dist_bn == "reduce")
        models = {"eval": self.model}
        if self.ema is not None:
            models["ema"] = self.ema.module
        if self.cfg.model_ema_force_cpu and "ema" in models:
            models["ema"] = copy.deepcopy(models["ema"]).to(self.process.device)
        return {
            name: evaluate(model, self.loaders.eval, self.precision, self.process, memory_format=self.memory_format)
            for name, model in models.items()
        }

    def finish(self, epoch: int, trained: TrainResult, evaluated: dict[str, EvalResult]) -> None:
        """Log the epoch, write its checkpoint, and set the next learning rate."""
        lr = learning_rate(self.optimizer)
        judged = evaluated.get("ema", evaluated["eval"])
        metric = getattr(judged, self.cfg.eval_metric)
        if self.schedule is not None:
            self.schedule.step(epoch + 1, metric)
        if not self.process.is_main:
            return
        assert self.log is not None
        row: dict[str, Any] = {"epoch": epoch, "lr": lr, "train_loss": trained.loss}
        for name, result in evaluated.items():
            row |= {f"{name}_{key}": getattr(result, key) for key in ("loss", "top1", "top5")}
        # The row first: a resumed run drops rows that its checkpoint does not know.
        self.log.epoch(row)
        self.log.tensorboard.add_scalar("speed/train_images_per_second", trained.images_per_second, epoch)
        self.log.tensorboard.add_scalar("speed/eval_images_per_second", judged.images_per_second, epoch)
        self.store.save(self._state(), epoch, metric)
        assert self.store.best is not None
        done = epoch + 1 - self.start_epoch
        left = (time.perf_counter() - self._started) / done * (self.num_epochs - epoch - 1)
        logger.info(
            f"epoch {epoch + 1}/{self.num_epochs}  lr {lr:.2e}  loss {trained.loss:.4f}  "
            f"eval loss {judged.loss:.4f}  top-1 {judged.top1:.2f}%  top-5 {judged.top5:.2f}%  "
            f"{trained.images_per_second:.0f} images/s  {clock(left)} left"
        )

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "arch": self.cfg.model,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "amp_scaler": self.precision.state_dict(),
            "config": self.cfg.as_dict(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
        return state

    def conclude(self) -> None:
        """Name the best epoch and draw the curves."""
        if not self.process.is_main or self.store.best is None:
            return
        metric, epoch = self.store.best
        unit = "" if self.cfg.eval_metric == "loss" else "%"
        curves = draw_curves(self.folder)
        logger.info(
            f"best {self.cfg.eval_metric}: {metric:.2f}{unit} in epoch {epoch + 1}, "
            f"{self.folder / checkpoint.BEST}; curves in {curves}"
        )
