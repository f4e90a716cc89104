"""Which models there are, and which settings each of them takes."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable
from typing import Any

import timm
from timm.models import model_entrypoint
from torch import nn

from utils.config.settings import Config
from utils.data.datasets import resolve_data
from utils.errors import UserError, did_you_mean

_logger = logging.getLogger("sdt")

# Settings that a named size (sdt_8_512, ...) brings itself; for those, only what was given explicitly counts.
SIZES = {
    "layer": "depths",
    "dim": "embed_dims",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratios",
    "pooling_stat": "pooling_stat",
    "embed_dims": "embed_dims",
    "depths": "depths",
}
_OF_V1 = ("layer", "dim", "pooling_stat")
# Settings that are an argument of the model, where that has another name.
_ARGUMENTS = SIZES | {"time_steps": "T"}
_OURS = ("model", "module")  # where this repository's models are written


def own_models() -> list[str]:
    """The registered models that are not timm's: those of this repository and of the plugins."""
    return [name for name in timm.list_models() if not model_entrypoint(name).__module__.startswith("timm.")]


def is_ours(cfg: Config) -> bool:
    """Whether `cfg` names a model that is written in this repository."""
    return cfg.model in own_models() and model_entrypoint(cfg.model).__module__.split(".")[0] in _OURS


def model_arguments(cfg: Config) -> dict[str, Any]:
    """What a model may take from the settings, by name of the argument; `img_size` is (height, width) in pixels."""
    _, height, width = resolve_data(cfg).input_size
    sizes = {
        argument: size
        for name, argument in SIZES.items()
        if (size := getattr(cfg, name)) is not None
        and (cfg.model == "sdt" or name in cfg.explicit)
        and not (cfg.is_v2 and name in _OF_V1)
    }
    return sizes | dict(
        img_size=(height, width),
        in_channels=cfg.in_channels,
        num_classes=cfg.num_classes,
        T=cfg.time_steps,
        dvs_mode=cfg.event_mode and not cfg.is_v2,
        TET=cfg.TET,
        kd=cfg.kd != "none",
        spike_mode=cfg.spike_mode,
        surrogate=cfg.surrogate,
        surrogate_alpha=cfg.surrogate_alpha,
        neuron_args=cfg.neuron_args,
        neuron_dtype=cfg.neuron_dtype,
        pretrained=cfg.pretrained,
    )


def create_model(cfg: Config) -> nn.Module:
    """The model that `cfg` names, given those of `model_arguments` that its signature names.

    The script must have imported `model` and the plugins, which register the names. Settings that were given and that
    the model does not take are listed in one warning.

    Raises:
        UserError: an unknown name, or values that do not fit.
    """
    entry = _entry(cfg.model)
    arguments = model_arguments(cfg)
    taken = inspect.signature(entry).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        ignored = [name for name in _given(cfg) if _ARGUMENTS.get(name, name) not in taken]
        if ignored:
            _logger.warning(f"warning: model {cfg.model} takes no {', '.join(ignored)}, so it does not get them")
        arguments = {name: value for name, value in arguments.items() if name in taken}
    try:
        inspect.signature(entry).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"model: {cfg.model} has arguments that no setting gives ({error}); give them a default in its signature"
        ) from error
    try:
        model = entry(**arguments)
    except ValueError as error:
        if not _is_about_settings(error, cfg):
            raise
        raise UserError(f"model {cfg.model}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model {cfg.model}: its function returns a value of type {type(model).__name__}; return a torch.nn.Module"
        )
    return model


def _entry(name: str) -> Callable[..., Any]:
    """The function that builds the model."""
    names = own_models()
    if name in names:
        return model_entrypoint(name)
    if timm.is_model(name):
        raise UserError(
            f"model: {name!r} is one of timm's own models, which return logits alone and have no time steps T; a model "
            "here returns (logits, hook): see docs/extending.md"
        )
    raise UserError(
        f"model: {name!r} is not registered{did_you_mean(name, names) or '.'} Valid: {', '.join(names)}, or one that a "
        "--plugin registers"
    )


def _given(cfg: Config) -> list[str]:
    """The settings meant for the model that were given and differ from their default.

    Not `img_size`: the data have that size whether or not a model asks for it.
    """
    arguments = model_arguments(cfg).keys() - {"img_size"}
    meant = {name for name in cfg.explicit if _ARGUMENTS.get(name, name) in arguments}
    defaults = type(cfg)()
    return [name for name in cfg.as_dict() if name in meant and getattr(cfg, name) != getattr(defaults, name)]


def _is_about_settings(error: ValueError, cfg: Config) -> bool:
    """Whether this repository's models found the values wrong; an error of a plugin's own code keeps its traceback."""
    modules = [frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [module for module in modules if module in (*_OURS, *cfg.plugin_modules)]
    return bool(known) and known[-1] in _OURS
