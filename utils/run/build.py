"""From a configuration to a model of timm's registry."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from utils.data.datasets import resolve_data
from utils.errors import UserError, did_you_mean
from utils.run.batchnorm import convert_split_batchnorm, convert_sync_batchnorm
from utils.run.checkpoint import load_weights

if TYPE_CHECKING:
    from utils.config.settings import Config
    from utils.run.distributed import Process

# Settings that a named size (sdt_8_512, ...) brings itself; for those, only what was given explicitly counts.
_SIZES = {
    "layer": "depths",
    "dim": "embed_dims",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratios",
    "pooling_stat": "pooling_stat",
}


def model_arguments(cfg: Config) -> dict[str, Any]:
    """The arguments of `timm.create_model(cfg.model, ...)`."""
    _, height, width = resolve_data(cfg).input_size
    sizes = {
        argument: getattr(cfg, name) for name, argument in _SIZES.items() if cfg.model == "sdt" or name in cfg.explicit
    }
    return sizes | dict(
        img_size_h=height,
        img_size_w=width,
        in_channels=cfg.in_channels,
        num_classes=cfg.num_classes,
        T=cfg.time_steps,
        spike_mode=cfg.spike_mode,
        dvs_mode=cfg.event_mode,
        TET=cfg.TET,
        backend=cfg.neuron_backend,
        neuron_dtype=cfg.neuron_dtype,
        engine=cfg.engine,
        bf16_input_grad=cfg.bf16_input_grad,
        pretrained=cfg.pretrained,
    )


def build_model(cfg: Config) -> nn.Module:
    """The model a configuration describes; the script must have imported `model`, which registers the names.

    Raises:
        UserError: an unknown name, or sizes that do not fit.
    """
    names = timm.list_models("sdt*")
    if cfg.model not in names:
        raise UserError(
            f"model: {cfg.model!r} is not registered{did_you_mean(cfg.model, names) or '.'} Valid: {', '.join(names)}"
        )
    arguments = model_arguments(cfg)
    try:
        model = timm.create_model(cfg.model, **arguments)
    except ValueError as error:
        raise UserError(f"model {cfg.model}: {error}") from error
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if cfg.bn_momentum is not None:
                module.momentum = cfg.bn_momentum
            if cfg.bn_eps is not None:
                module.eps = cfg.bn_eps
    return model


def check_neurons(model: nn.Module, device: torch.device, *dtypes: torch.dtype) -> None:
    """Find out before the first batch whether the neurons' backend runs on `device` with inputs of these types.

    Raises:
        UserError: it does not, with the reason.
    """
    for module in model.modules():
        # What `auto` chooses runs; asking would load, or compile, its kernels.
        if getattr(module, "backend_choice", "auto") == "auto":
            continue
        for dtype in dtypes:
            try:
                module.backend_for(torch.empty(1, device=device, dtype=dtype))  # type: ignore[operator]
            except ValueError as error:
                raise UserError(f"neuron_backend: {error}") from error


def for_evaluation(model: nn.Module) -> nn.Module:
    """What evaluates the weights that `model` has now fastest: `model` itself where it knows nothing faster."""
    faster = getattr(model, "for_evaluation", None)
    result = model if faster is None else faster()
    assert isinstance(result, nn.Module)
    return result


def prepare_for_training(cfg: Config, model: nn.Module, process: Process) -> tuple[nn.Module, list[nn.Module]]:
    """Initial weights, BatchNorm variants, frozen parts, device and layout; the model and its frozen modules.

    Raises:
        UserError: the initial checkpoint cannot be loaded.
    """
    if cfg.initial_checkpoint:
        load_weights(model, cfg.initial_checkpoint)
    frozen: list[nn.Module] = []
    if cfg.linear_prob:
        # Linear probing: the head learns on features that do not change, running statistics included.
        frozen = [module for name, module in model.named_children() if name != "head"]
        for module in frozen:
            module.requires_grad_(False)
    if cfg.split_bn:
        model = convert_split_batchnorm(model, cfg.aug_splits, cfg.time_steps)
    if cfg.sync_bn and process.world_size > 1:
        model = convert_sync_batchnorm(model, process.device)
    model.to(process.device)
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    if cfg.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # every sdt model has it
    return model, frozen


def with_sizes_of(cfg: Config, model: nn.Module) -> Config:
    """`cfg` with the sizes that a named model brought itself, so that a saved configuration is complete."""
    return dataclasses.replace(cfg, **{name: getattr(model, argument) for name, argument in _SIZES.items()})


def parameter_count(model: nn.Module) -> int:
    """Parameters including the unused ones that published checkpoints carry."""
    return sum(p.numel() for p in model.parameters())
