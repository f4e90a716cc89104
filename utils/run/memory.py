"""How much memory a run needs at least, found without taking any, and how much this machine has."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils.config.settings import Config
from utils.data.datasets import dataset_facts, resolve_data
from utils.errors import UserError
from utils.run.models import create_model, is_ours

_FLOAT = 4  # bytes
# Values that an optimizer keeps per weight; of the others it is not known here.
_MOMENTS = {"adam": 2, "adamw": 2, "nadam": 2, "nadamw": 2, "radam": 2, "lamb": 2, "adan": 3, "lion": 1}
_WITH_MOMENTUM = ("sgd", "nesterov", "momentum")
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Need:
    """A lower bound of the memory that one process needs, in bytes by purpose."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    batch: int = 0
    activation: int = 0  # the largest output of one layer; training keeps several

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        named = ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size)
        return f"at least {in_words(self.total)} ({named.replace('activation', 'largest activation')})"


def in_words(size: float) -> str:
    """Bytes as MiB or GiB for a message."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def refuse_what_does_not_fit(cfg: Config, device: torch.device) -> Need | None:
    """The memory that training needs at least; None for a model of a plugin, which is only known when it is built.

    Raises:
        UserError: this machine, or its GPU, has less.
    """
    need = training_need(cfg) if is_ours(cfg) else None
    if need:
        _refuse(need, device, f"batch_size (now {cfg.batch_size})", cfg)
    return need


def refuse_evaluation_that_does_not_fit(cfg: Config, device: torch.device, images: int) -> None:
    """UserError where this machine, or its GPU, has less memory than it takes at least to evaluate `images` at a time.

    A model of a plugin is not estimated.
    """
    if is_ours(cfg):
        _refuse(evaluation_need(cfg, images), device, f"val_batch_size (now {cfg.val_batch_size})", cfg)


def _refuse(need: Need, device: torch.device, batch: str, cfg: Config) -> None:
    for place, size in memory_of(device).items():
        if need.total > size:
            raise UserError(
                f"this run does not fit: it needs {need}, and {place} has {in_words(size)}; make {batch}, time_steps "
                f"(now {cfg.time_steps}), img_size or the model smaller"
            )


def training_need(cfg: Config) -> Need:
    """What one process needs for a training step."""
    model = _without_memory(cfg)
    need = _need(cfg, model, cfg.batch_size * max(cfg.aug_splits, 1), resolve_data(cfg).input_size)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    opt = cfg.opt.lower().removeprefix("lookahead_")
    moments = _MOMENTS.get(opt, int(opt in _WITH_MOMENTUM and cfg.momentum > 0))
    average = need.weights if cfg.model_ema and not cfg.model_ema_force_cpu else 0
    return dataclasses.replace(need, gradients=trained, optimizer=moments * trained, average=average)


def evaluation_need(cfg: Config, images: int) -> Need:
    """What one process needs to evaluate a batch of `images`."""
    return _need(cfg, _without_memory(cfg), images, resolve_data(cfg).eval_size)


def _without_memory(cfg: Config) -> nn.Module:
    """The model on torch's device meta, of one time step: T changes no weight."""
    # The first weights of the run must not depend on this.
    with _unheard(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        return create_model(dataclasses.replace(cfg, time_steps=1))


def _need(cfg: Config, model: nn.Module, images: int, size: tuple[int, int, int]) -> Need:
    """Weights, a batch of `images` of this size, and the largest activation."""
    events = dataset_facts(cfg.dataset).events
    shape = (1, 1, *size) if events else (1, *size)
    values = math.prod(shape) * (cfg.time_steps if events else 1)
    return Need(
        weights=sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers())),
        batch=images * values * _FLOAT,
        activation=images * cfg.time_steps * _largest_output(model, shape) * (2 if cfg.amp else _FLOAT),
    )


def _largest_output(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Values in the largest output of a convolution or linear layer, for an input of this shape."""
    largest = 0

    def note(module: nn.Module, given: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    for module in model.eval().modules():
        if isinstance(module, (nn.Conv2d, nn.Conv1d, nn.Linear)):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(shape, device="meta"))
    return largest


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """What the model says while it is built, it says again when it is built for the run."""
    logger = logging.getLogger("sdt")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def memory_of(device: torch.device) -> dict[str, int]:
    """The bytes that a process may have, by the name of what limits them."""
    if device.type == "cuda":
        return {"the GPU": torch.cuda.get_device_properties(device).total_memory}
    found: dict[str, int] = {}
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on every system
        found["this machine"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            found["this container"] = int(Path(path).read_text())
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            found["this process (ulimit -v)"] = max(0, limit - taken)
    return found
