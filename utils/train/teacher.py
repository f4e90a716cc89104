"""Teachers for distillation: a model of timm, a checkpoint of a run of this project, or stored logits.

Legend: B batch, C channels, H x W image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from utils.config.parse import config_from
from utils.config.settings import Config
from utils.data.datasets import dataset_facts, resolve_data
from utils.errors import UserError, did_you_mean, first_line
from utils.run.build import build_model, make_faster
from utils.run.checkpoint import load_fitting, load_weights, read_checkpoint, weights_in
from utils.run.distributed import Process
from utils.run.models import own_models
from utils.run.precision import Precision

# A batch as the student sees it, and its targets -> logits [B, K].
Teacher = Callable[[Tensor, Tensor], Tensor]

_Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std per channel
_FILES = (".pt", ".pth", ".tar", ".bin", ".ckpt")
_DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, ImportError)


class ModelTeacher:
    """A network in evaluation mode that sees the student's augmented batch.

    Args:
        model: images -> logits `[B, K]`, or `(logits, hook)` as the models of this project return.
        seen: mean and std with which the student's images are normalised.
        wanted: those with which the teacher was trained.
    """

    def __init__(self, model: nn.Module, seen: _Statistics, wanted: _Statistics, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        scale, shift = zip(
            *((std / s, (mean - m) / s) for mean, std, m, s in zip(*seen, *wanted, strict=True)), strict=True
        )
        self._same = set(scale) == {1.0} and set(shift) == {0.0}
        self._scale, self._shift = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (scale, shift))

    @torch.no_grad()
    def __call__(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(x if self._same else x * self._scale + self._shift)
        logits = logits[0] if isinstance(logits, tuple) else logits
        result: Tensor = logits.mean(dim=0) if logits.dim() == 3 else logits  # of each time step, with TET
        return result


class StoredLogits:
    """Logits `[samples, K]` of the whole training set, computed before; targets come as pairs of label and number."""

    def __init__(self, logits: Tensor, path: str, device: torch.device) -> None:
        self.logits, self.path = logits.to(device), path

    def check_length(self, samples: int) -> None:
        """UserError unless there are logits for each of the training samples."""
        if len(self.logits) != samples:
            raise UserError(
                f"teacher: {self.path} has logits of {len(self.logits)} samples, the training set has {samples}; store "
                "one row for each training sample, in the order of the set"
            )

    def __call__(self, x: Tensor, targets: Tensor) -> Tensor:
        """The rows of the samples whose numbers are `targets[:, 1]`."""
        return self.logits[targets[:, 1]]


def make_teacher(cfg: Config, process: Process, precision: Precision) -> Teacher | None:
    """The teacher of the settings, or None.

    Raises:
        UserError: it cannot be loaded, or has other classes or inputs than the run.
    """
    if cfg.kd == "none":
        return None
    if Path(cfg.teacher).is_file() or "/" in cfg.teacher or cfg.teacher.endswith(_FILES):
        content = read_checkpoint(cfg.teacher)
        if "logits" in content:
            return _stored(cfg, content["logits"], process)
        teacher = _of_a_run(cfg, content, process, precision)
    else:
        teacher = _of_timm(cfg, process)
    _try_out(cfg, teacher, process, precision)
    return teacher


def _stored(cfg: Config, logits: Any, process: Process) -> StoredLogits:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        raise UserError(f"teacher: 'logits' in {cfg.teacher} must be a floating-point tensor [samples, classes]")
    _check_classes(cfg, logits.shape[1])
    if cfg.mixes or cfg.event_mix:
        raise UserError(
            "teacher: stored logits are of whole samples and do not fit mixed ones; switch mixup, cutmix and event_mix "
            "off, or use a model as teacher"
        )
    return StoredLogits(logits.float(), cfg.teacher, process.device)


def _of_a_run(cfg: Config, content: Mapping[str, Any], process: Process, precision: Precision) -> ModelTeacher:
    """The model of a checkpoint that this project's training wrote."""
    if not isinstance(content.get("config"), Mapping):
        raise UserError(
            f"teacher: {cfg.teacher} holds neither 'logits' nor the 'config' of a run of this project; for weights of "
            "a timm model, give its name as teacher and this file as teacher_checkpoint"
        )
    theirs = config_from(content["config"])
    _check_classes(cfg, theirs.num_classes)
    model = build_model(theirs)
    load_fitting(model, weights_in(content, cfg.teacher), content, cfg.teacher)
    model.to(process.device)
    make_faster(theirs, model, process, precision, training=False)
    return ModelTeacher(model, _statistics(cfg), _statistics(theirs), process.device)


def _of_timm(cfg: Config, process: Process) -> ModelTeacher:
    name = cfg.teacher
    if not timm.is_model(name.split(".")[0]) or name in own_models():
        raise UserError(
            f"teacher: {name!r} is neither a file nor a model of timm{did_you_mean(name, timm.list_models()) or ''}; "
            "give for example caformer_b36.sail_in22k_ft_in1k, or the path of a checkpoint"
        )
    settings: dict[str, Any] = dict(in_chans=cfg.in_channels)
    try:
        if cfg.teacher_checkpoint:
            model = timm.create_model(name, num_classes=cfg.num_classes, **settings)
            load_weights(model, cfg.teacher_checkpoint)
        else:
            model = timm.create_model(name, pretrained=True, **settings)
    except UserError:
        raise
    except _DOWNLOAD_ERRORS as error:
        raise UserError(
            f"teacher: the weights of {name} cannot be loaded ({first_line(error)}); check name and network, or give a "
            "file with them as teacher_checkpoint"
        ) from error
    _check_classes(cfg, model.num_classes)
    known = model.pretrained_cfg
    wanted = (known["mean"], known["std"])
    seen = _statistics(cfg)
    if len(wanted[0]) != len(seen[0]):
        wanted = seen
    return ModelTeacher(model, seen, wanted, process.device)


def _check_classes(cfg: Config, classes: int) -> None:
    if classes != cfg.num_classes:
        raise UserError(f"teacher: {cfg.teacher} has {classes} classes, num_classes is {cfg.num_classes}")


def _statistics(cfg: Config) -> _Statistics:
    data = resolve_data(cfg)
    return data.mean, data.std


def _try_out(cfg: Config, teacher: Teacher, process: Process, precision: Precision) -> None:
    """UserError unless the teacher takes a batch of this run."""
    C, H, W = resolve_data(cfg).input_size
    shape = (2, cfg.time_steps, C, H, W) if dataset_facts(cfg.dataset).events else (2, C, H, W)
    try:
        with precision.autocast():
            logits = teacher(torch.zeros(shape, device=process.device), torch.zeros(2, dtype=torch.int64))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"teacher: {cfg.teacher} cannot take input {list(shape)} of this run ({first_line(error)}); use one for "
            "this size, or stored logits"
        ) from error
    if list(logits.shape) != [2, cfg.num_classes]:
        raise UserError(f"teacher: {cfg.teacher} returns {list(logits.shape)}; [2, {cfg.num_classes}] was expected")
