"""Everything of a run that training changes: weights, their average, optimizer, schedule, loss scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from utils.config.settings import SETTINGS, TRAIN, Config
from utils.errors import NonFiniteError, UserError, shortened
from utils.run.build import rows
from utils.run.checkpoint import load_fitting, read_checkpoint
from utils.run.console import logger
from utils.run.plugins import record, say_what_changed
from utils.run.precision import Precision
from utils.run.reproduce import git_commit, versions
from utils.run.weights import weights_in
from utils.train.moments import load_moments
from utils.train.optim import set_learning_rate
from utils.train.saved_state import SavedState, saved_state

# Settings that may change when a run is resumed; of the others, a change is warned of.
_FREE_ON_RESUME = {
    *("resume", "no_resume_opt", "experiment", "output", "initial_checkpoint", "dry_run"),
    *("workers", "pin_mem", "log_interval", "local_rank", "checkpoint_hist", "recovery_interval"),
    *("log_wandb", "event_wire", "plugin", "initial_partial", "cuda_graph"),  # of plugins, their contents are compared
    *(name for name, setting in SETTINGS.items() if not setting.serves(TRAIN)),
}


@dataclass
class RunState:
    """The parts that training changes; `model` has no wrapper (DistributedDataParallel, torch.compile)."""

    model: nn.Module
    optimizer: Optimizer
    schedule: Scheduler | None
    precision: Precision
    ema: ModelEmaV3 | None

    def __post_init__(self) -> None:
        self._first_rates = [group["lr"] for group in self.optimizer.param_groups]

    def snapshot(self, cfg: Config) -> dict[str, Any]:
        """All of it as tensors and plain data, with the configuration and the versions of the packages.

        Raises:
            NonFiniteError: a weight or running statistic, or its moving average, is NaN or infinite.
        """
        for kind, module in (("", self.model), ("the moving average of ", self.ema and self.ema.module)):
            for name, value in module.state_dict().items() if module is not None else ():
                if not bool(torch.isfinite(value).all()):
                    raise NonFiniteError(f"{kind}{name} is no longer finite, so this state is not saved")
        state: dict[str, Any] = {
            "arch": cfg.model,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "amp_scaler": self.precision.state_dict(),
            "config": cfg.as_dict(),
            "versions": versions(),
            "git_commit": git_commit(),
            "plugins": record(),
            "parts": [tuple(row) for row in rows(self.model)],
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        if isinstance(self.schedule, PlateauLRScheduler):
            past = self.schedule.lr_scheduler.state_dict()
            state["plateau"] = {"past": past, "restore_lr": self.schedule.restore_lr}
        return state

    def restore_weights(self, path: Path) -> None:
        """Load the weights and their moving average from `path`.

        Raises:
            UserError: the file cannot be read or does not fit the model; nothing was loaded then.
        """
        self._load_weights(read_checkpoint(path), path)

    def _load_weights(self, content: Mapping[Any, Any], path: Path) -> None:
        load_fitting(self.model, weights_in(content, path), content, path)
        if self.ema is not None:
            # A run without an average starts one from the weights.
            average = weights_in(content, path, use_ema="state_dict_ema" in content)
            load_fitting(self.ema.module, average, content, path)

    def restore(self, path: Path, cfg: Config) -> SavedState:
        """Load everything from `path`, warn of settings that differ, and return what it holds beside the weights.

        Raises:
            UserError: the file cannot be read, does not fit, or holds weights only.
        """
        content = read_checkpoint(path)
        saved = saved_state(content, path)
        self._load_weights(content, path)
        then = saved.config or {}
        if then.get("opt", cfg.opt) != cfg.opt:
            raise UserError(
                f"checkpoint {path}: its optimizer is {shortened(then['opt'])}, opt is {cfg.opt!r}; resume with the "
                "same, or add --no-resume-opt"
            )
        if then.get("split_hash") and cfg.split_hash and then["split_hash"] != cfg.split_hash:
            # The run would train on samples that it is evaluated on.
            raise UserError(
                f"split_hash: checkpoint {path} was trained on split {shortened(then['split_hash'])}, the data give "
                f"{cfg.split_hash}; set event_split as it was and restore the files, or add --no-resume-opt"
            )
        if differences := _differences(then, cfg):
            logger.warning(f"warning: settings that differ from those in {path}: {'; '.join(differences)}")
        say_what_changed(content, path)
        if changes := _otherwise(saved.parts or (), rows(self.model)):
            logger.warning(f"warning: going on with parts that run otherwise than in {path}: {'; '.join(changes)}")
        self._restore_optimizer(content["optimizer"], saved, path)
        self.precision.load_state_dict(content.get("amp_scaler") or {})
        self._restore_schedule(saved, path)
        return saved

    def _restore_optimizer(self, moments: Mapping[str, Any], saved: SavedState, path: Path) -> None:
        """Load the moments; weight decay, betas and the like stay those of the present configuration."""
        present = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        load_moments(self.optimizer, moments, saved, path)
        for group, values in zip(self.optimizer.param_groups, present, strict=True):
            group.update(values)

    def _restore_schedule(self, saved: SavedState, path: Path) -> None:
        """Set the learning rate of the epoch to continue with.

        A schedule is a function of the epoch and the present configuration. Only the plateau schedule has a state of
        its own, which comes from the checkpoint.

        Raises:
            UserError: that state is not one of this schedule.
        """
        if isinstance(self.schedule, PlateauLRScheduler):
            if saved.plateau is not None:
                past, present = saved.plateau.past, self.schedule.lr_scheduler.state_dict()
                if odd := [key for key in {**present, **past} if not _alike(past.get(key), present.get(key))]:
                    raise UserError(
                        f"checkpoint {path}: plateau.past.{odd[0]} is {shortened(past.get(odd[0]))}, here "
                        f"{shortened(present.get(odd[0]))}; add --no-resume-opt, or resume with the same versions"
                    )
                self.schedule.lr_scheduler.load_state_dict({key: past[key] for key in past if key in present})
                self.schedule.restore_lr = saved.plateau.restore_lr
            return
        epoch = saved.position[0]
        for group, first in zip(self.optimizer.param_groups, self._first_rates, strict=True):
            group["lr"] = first
        if epoch > 0:
            set_learning_rate(self.schedule, epoch)


def _alike(a: Any, b: Any) -> bool:
    """Whether two values are of one type; whole and real numbers are of one, and None fits all."""
    return a is None or b is None or type(a) is type(b) or {type(a), type(b)} == {int, float}


def _otherwise(then: Iterable[Sequence[Any]], now: Iterable[Sequence[Any]]) -> list[str]:
    """The parts that another kernel computes than before: their results may differ in the last bits."""
    old, new = ({str(row[0]): str(row[2]) for row in found} for found in (then, now))
    return [f"{part} ran as {way}, now as {new[part]}" for part, way in old.items() if new.get(part, way) != way]


def _differences(then: Mapping[str, Any], cfg: Config) -> list[str]:
    return [
        f"{key} was {shortened(then[key])} and is {value!r}"
        for key, value in cfg.as_dict().items()
        if key in then and key not in _FREE_ON_RESUME and _as_stored_now(key, then[key]) != value
    ]


def _as_stored_now(key: str, value: Any) -> Any:
    """A value of an older checkpoint, whose word for it may have been another one."""
    try:
        return SETTINGS[key].read(value)
    except (ValueError, TypeError, OverflowError):
        return value
