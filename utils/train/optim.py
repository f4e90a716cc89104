"""Optimizer and learning-rate schedule, both from timm's factories."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import Lamb, create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from utils.config.settings import Config
from utils.errors import UserError, did_you_mean
from utils.train.lamb import DeviceLamb


def peak_learning_rate(cfg: Config, world_size: int) -> float:
    """`lr` as it is, or `lr_base` scaled with the samples per update of all processes (Goyal et al. 2017)."""
    if cfg.lr_base is None:
        return cfg.lr
    ratio = cfg.batch_size * world_size * cfg.grad_accum_steps / cfg.lr_base_size
    return cfg.lr_base * (ratio if cfg.lr_base_scale == "linear" else ratio**0.5)


_HIGHEST_RATE = 1e6  # far above of what any optimizer can use
_MOST_EPOCHS = 200_000  # what epochs and cooldown_epochs allow together; cycles could make it any number

# It needs second derivatives, for which the training loop would have to keep the graph of the backward pass.
_NEEDS_SECOND_DERIVATIVES = ("adahessian",)


# Optimizers of torch that can update a parameter in one pass through memory, with the same arithmetic, and where.
_FUSED = dict.fromkeys(("adam", "adamw"), ("cpu", "cuda")) | dict.fromkeys(("sgd", "nesterov", "momentum"), ("cuda",))


def make_optimizer(cfg: Config, model: nn.Module, world_size: int = 1) -> Optimizer:
    """The optimizer named `cfg.opt`, as `adamw` or `lookahead_adamw`; biases and 1-D tensors are not decayed.

    Parameters without gradient (kept for checkpoint keys) are left out by timm.

    Raises:
        UserError: a name timm does not know, an optimizer that cannot run here, or `opt_eps` / `opt_betas` that
            it does not take.
    """
    _check_name(cfg.opt)
    lr = peak_learning_rate(cfg, world_size)
    device = next(model.parameters()).device.type
    try:
        # timm passes eps and betas on unchecked, or drops them; the optimizer's own defaults show what it takes.
        takes = create_optimizer_v2([nn.Parameter(torch.zeros(1))], opt=cfg.opt, lr=lr).defaults
        optimizer = create_optimizer_v2(
            model,
            opt=cfg.opt,
            lr=lr,
            weight_decay=cfg.weight_decay,
            momentum=cfg.momentum,
            filter_bias_and_bn=True,
            **_eps_and_betas(cfg, takes),
            **({"fused": True} if device in _FUSED.get(cfg.opt.lower(), ()) else {}),
        )
        return DeviceLamb(optimizer.param_groups) if device == "cuda" and type(optimizer) is Lamb else optimizer
    except (AssertionError, ImportError) as error:
        # Optimizers of other packages: CUDA or the package is missing.
        raise UserError(f"opt: {cfg.opt!r} cannot be used here: {error or type(error).__name__}") from error


def _check_name(opt: str) -> None:
    """UserError for an optimizer that timm does not have, or that the training loop cannot use."""
    valid = [name for name in list_optimizers() if name not in _NEEDS_SECOND_DERIVATIVES]
    name = opt.lower().removeprefix("lookahead_")
    if name in _NEEDS_SECOND_DERIVATIVES:
        raise UserError(f"opt: {opt!r} needs second derivatives, which training does not compute; choose another one")
    if name not in valid:
        raise UserError(
            f"opt: {opt!r} is not an optimizer of timm{did_you_mean(name, valid) or '.'} "
            f"Valid: {', '.join(sorted(valid))}"
        )


def _eps_and_betas(cfg: Config, takes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `opt_eps` and `opt_betas` as arguments, checked against the optimizer's defaults."""
    given: dict[str, Any] = {}
    if cfg.opt_eps is not None:
        if "eps" not in takes:
            raise UserError(f"opt_eps: {cfg.opt!r} has no epsilon; leave it out")
        given["eps"] = cfg.opt_eps
    if cfg.opt_betas is not None:
        expected = takes.get("betas")
        if expected is None:
            raise UserError(f"opt_betas: {cfg.opt!r} has no betas; leave them out")
        if len(cfg.opt_betas) != len(expected):
            raise UserError(
                f"opt_betas: {cfg.opt_betas} has {len(cfg.opt_betas)} values, {cfg.opt!r} takes {len(expected)} "
                f"(default: {', '.join(map(str, expected))})"
            )
        given["betas"] = tuple(cfg.opt_betas)
    return given


# The settings that shape each schedule; what is wrong about one of them is told with all of them.
_OF_A_SHAPE = ("decay_rate", "min_lr", "lr_cycle_mul", "lr_cycle_limit", "cooldown_epochs")
_SHAPED_BY = {"step": ("decay_epochs", "decay_rate"), "plateau": ("decay_rate", "patience_epochs", "min_lr")}


def make_schedule(cfg: Config, optimizer: Optimizer, steps: int = 1) -> tuple[Scheduler | None, int]:
    """The schedule of learning rates, and the number of epochs with the cool-down.

    Warm-up lies inside the `epochs`; `cooldown_epochs` at `min_lr` are added after them. The shape (a cosine, say)
    begins with the first epoch, of which the warm-up replaces the start, or with `warmup_prefix` after the warm-up.

    Args:
        steps: batches per epoch, in which a schedule of `sched_on_updates` counts.

    Raises:
        UserError: an epoch would have no learning rate; all of them are tried first.
    """
    peak = max(group["lr"] for group in optimizer.param_groups)
    if cfg.sched != "step" and cfg.min_lr > peak:
        raise UserError(
            f"min_lr: {cfg.min_lr:g} is above the peak learning rate {peak:g}, and sched {cfg.sched} would rise to it; "
            f"set min_lr to {peak:g} or less"
        )
    _try_schedule(cfg, peak, steps)
    return _create_schedule(cfg, optimizer, steps)


def _try_schedule(cfg: Config, peak: float, steps: int) -> None:
    """Walk through the whole schedule with an optimizer of its own, so that it does not end a run in the middle."""
    shaped_by = ("epochs", "warmup_epochs", *_SHAPED_BY.get(cfg.sched, _OF_A_SHAPE))
    given = [f"{name} {getattr(cfg, name)!r}" for name in shaped_by]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    epoch, num_epochs = 0, cfg.epochs
    try:
        schedule, num_epochs = _create_schedule(cfg, optimizer, steps)
        if num_epochs > _MOST_EPOCHS:
            raise UserError(
                f"lr_cycle_limit: {cfg.lr_cycle_limit} cycles, the first of {cfg.epochs} epochs and each "
                f"{cfg.lr_cycle_mul:g} times as long as the one before, are {num_epochs:.3g} epochs; at most "
                f"{_MOST_EPOCHS:,} are possible: make lr_cycle_limit, lr_cycle_mul or epochs smaller"
            )
        for epoch in range(1, num_epochs + 1):
            set_learning_rate(schedule, epoch, 0.0)
            set_rate_of_step(schedule, epoch, steps, 0)
            rate = learning_rate(optimizer)
            if not 0 <= rate <= _HIGHEST_RATE:
                raise ValueError(f"it would be {rate:g}")
    except UserError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"sched: {cfg.sched} gives no usable learning rate in epoch {epoch + 1} of {num_epochs} ({error}); change "
            f"one of {', '.join(given)}"
        ) from error


def _create_schedule(cfg: Config, optimizer: Optimizer, steps: int) -> tuple[Scheduler | None, int]:
    with warnings.catch_warnings():
        # The reduce-on-plateau schedule is a published option; timm keeps it and calls it deprecated.
        warnings.filterwarnings("ignore", message=".*[Pp]lateau.*")
        warnings.filterwarnings("ignore", message=".*verbose parameter is deprecated.*")  # timm 1.0.15, torch 2.6
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            sched=cfg.sched,
            num_epochs=cfg.epochs - (cfg.warmup_epochs if cfg.warmup_prefix else 0),
            decay_epochs=cfg.decay_epochs,
            cooldown_epochs=cfg.cooldown_epochs,
            patience_epochs=cfg.patience_epochs,
            decay_rate=cfg.decay_rate,
            min_lr=cfg.min_lr,
            warmup_lr=cfg.warmup_lr,
            warmup_epochs=cfg.warmup_epochs,
            warmup_prefix=cfg.warmup_prefix,
            step_on_epochs=not cfg.sched_on_updates,
            updates_per_epoch=steps,
            # timm takes one number (from there on) or a pair (from, to), as shares of the schedule.
            noise=cfg.lr_noise[0] if cfg.lr_noise and len(cfg.lr_noise) == 1 else cfg.lr_noise,
            noise_pct=cfg.lr_noise_pct,
            noise_std=cfg.lr_noise_std,
            noise_seed=cfg.seed,
            cycle_mul=cfg.lr_cycle_mul,
            cycle_decay=0.1,
            cycle_limit=cfg.lr_cycle_limit,
            plateau_mode="min" if cfg.eval_metric == "loss" else "max",
        )
    return scheduler, num_epochs


def set_rate_of_step(schedule: Scheduler | None, epoch: int, steps: int, step: int) -> None:
    """Set the learning rate of batch `step` of the `steps` in `epoch`, if the schedule counts in batches."""
    if schedule is not None:
        schedule.step_update(epoch * steps + step)


def set_learning_rate(schedule: Scheduler | None, epoch: int, metric: float | None = None) -> None:
    """Set the learning rate of `epoch`, if the schedule counts in epochs.

    `metric` is that of the epoch before (for the plateau schedule).
    """
    if schedule is None:
        return
    with warnings.catch_warnings():
        # timm's plateau schedule gives torch the epoch, which some releases of torch call deprecated.
        warnings.filterwarnings("ignore", message=".*[Ee]poch.*", category=UserWarning)
        schedule.step(epoch, metric)


def learning_rate(optimizer: Optimizer) -> float:
    """The present learning rate, averaged over the parameter groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return float(sum(rates) / len(rates))
