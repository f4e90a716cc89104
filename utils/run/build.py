"""From a configuration to a model of timm's registry."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from module.accelerate import accelerate, for_evaluation, rows
from utils.config.settings import SETTINGS, Config
from utils.errors import UserError
from utils.run.batchnorm import convert_split_batchnorm, convert_sync_batchnorm
from utils.run.checkpoint import load_weights
from utils.run.contract import check_contract
from utils.run.distributed import Process
from utils.run.models import SIZES, create_model
from utils.run.partial import load_partial
from utils.run.precision import Precision

__all__ = ["for_evaluation", "rows"]  # for the rest of utils, which does not import module


def build_model(cfg: Config) -> nn.Module:
    """The model a configuration describes; the script must have imported `model` and the plugins.

    Raises:
        UserError: an unknown name, or values that do not fit.
    """
    model = create_model(cfg)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if cfg.bn_momentum is not None:
                module.momentum = cfg.bn_momentum
            if cfg.bn_eps is not None:
                module.eps = cfg.bn_eps
            if cfg.bn_init_bias and module.affine:
                nn.init.constant_(module.bias, cfg.bn_init_bias)
    return model


def make_faster(cfg: Config, model: nn.Module, process: Process, precision: Precision, *, training: bool) -> None:
    """Attach the faster ways that the settings allow, each after its proof; all processes attach the same.

    Args:
        model: on its device, and in all else as it will run.
        training: whether it will be trained, or only evaluated.

    Raises:
        UserError: `neuron_backend` names one that cannot run here, with the reason.
    """
    try:
        accelerate(
            model,
            kernels=cfg.kernels,
            neuron_backend=cfg.neuron_backend,
            engine=cfg.engine,
            bf16_input_grad=cfg.bf16_input_grad,
            amp_dtype=precision.dtype if precision.enabled else None,
            training=training,
            agree=process.first_reasons,
        )
    except ValueError as error:
        raise UserError(f"neuron_backend: {error}") from error


def layout_of(cfg: Config, model: nn.Module, device: torch.device) -> tuple[bool, str]:
    """Whether channels are to be innermost in memory, and why; `model` with its faster ways attached."""
    if cfg.channels_last is not None:
        return cfg.channels_last, "as set"
    if device.type == "cuda":
        if any("Triton kernels" in row.runs_as for row in rows(model)):
            return True, "the Triton kernels read and write it"
        if cfg.amp:
            return True, "tensor cores multiply 16-bit numbers in it"
    return False, "innermost is faster with Triton kernels or amp on CUDA only"


def set_layout(cfg: Config, model: nn.Module, device: torch.device) -> None:
    """Give the weights the layout of `layout_of`."""
    if layout_of(cfg, model, device)[0]:
        model.to(memory_format=torch.channels_last)


def prepare_for_training(
    cfg: Config, model: nn.Module, process: Process, precision: Precision
) -> tuple[nn.Module, list[nn.Module]]:
    """Initial weights, BatchNorm variants, frozen parts, device, layout, faster ways; the model and its frozen modules.

    Raises:
        UserError: the initial checkpoint cannot be loaded, or the model lacks something that is needed.
    """
    if cfg.initial_checkpoint:
        # Of a distilled run that goes on from one without a teacher, the second head starts fresh.
        load_weights(model, cfg.initial_checkpoint, fresh=("head_kd.",) if cfg.kd != "none" else ())
    if cfg.initial_partial:
        load_partial(model, cfg.initial_partial)
    frozen: list[nn.Module] = []
    if cfg.linear_prob:
        # Linear probing: the head learns on features that do not change, running statistics included.
        if not isinstance(getattr(model, "head", None), nn.Module):
            raise UserError(f"linear_prob: model {cfg.model} has no part called head; leave linear_prob out")
        frozen = [module for name, module in model.named_children() if name != "head"]
        for module in frozen:
            module.requires_grad_(False)
    if cfg.split_bn:
        model = convert_split_batchnorm(model, cfg.aug_splits, cfg.time_steps)
    if cfg.sync_bn and process.world_size > 1:
        model = convert_sync_batchnorm(model, process.device)
    model.to(process.device)
    check_contract(cfg, model, process.device)
    make_faster(cfg, model, process, precision, training=True)
    set_layout(cfg, model, process.device)
    if cfg.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError(f"grad_checkpointing: model {cfg.model} has no set_grad_checkpointing; leave it out")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model, frozen


def parts_in_words(model: nn.Module) -> str:
    """How each part of a model runs, and why not faster, in a line each."""
    found = rows(model)
    wide = max((len(row.part) for row in found), default=0)
    return "\n".join(
        f"{row.number:4} x {row.part:{wide}}  {row.runs_as}{f' ({row.why_not_faster})' if row.why_not_faster else ''}"
        for row in found
    )


def with_sizes_of(cfg: Config, model: nn.Module) -> Config:
    """`cfg` with the sizes that the model says it has, so that a saved configuration is complete."""
    sizes: dict[str, Any] = {name: getattr(model, argument, None) for name, argument in SIZES.items()}
    # Another model may have none of these, or something else under the name.
    known: dict[str, Any] = {
        name: size
        for name, size in sizes.items()
        if isinstance(size, list if SETTINGS[name].is_list else SETTINGS[name].kind)
    }
    return dataclasses.replace(cfg, **known)


def sizes_in_words(cfg: Config, model: nn.Module) -> str:
    """Blocks, width and neurons of a model that has them, for the log; each followed by a comma."""
    if not hasattr(model, "depths") or not hasattr(model, "embed_dims"):
        return ""
    if isinstance(model.embed_dims, list):
        blocks, widths = " + ".join(map(str, cfg.depths or [])), ", ".join(map(str, model.embed_dims))
        return f"{blocks} blocks, D = {widths}, {cfg.spike_mode} neurons, "
    return f"{cfg.layer} blocks, D = {cfg.dim}, {cfg.spike_mode} neurons, "


def parameter_count(model: nn.Module) -> int:
    """Parameters including the unused ones that published checkpoints carry."""
    return sum(p.numel() for p in model.parameters())
