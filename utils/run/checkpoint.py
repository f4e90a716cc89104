"""Checkpoints: written whole or not at all, read without running code, loaded with all keys or not at all.

A checkpoint is a `torch.save` dictionary: `state_dict`, `epoch`, and where they exist `state_dict_ema`, `optimizer`,
`plateau`, `amp_scaler`, `metric`, `history`, `best`, `config`, `versions`, `git_commit`; one from within an epoch also
has `progress`. Published files have the same `state_dict`, with or without a `module.` prefix, or are the bare state
dict.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import UserError, first_line
from utils.files import replacing

_logger = logging.getLogger("sdt")

_SPLIT = ".aux_bn."
# Settings on which the keys and shapes of the weights depend.
_SIZES = (
    "model",
    "layer",
    "dim",
    "embed_dims",
    "depths",
    "num_heads",
    "mlp_ratio",
    "in_channels",
    "num_classes",
    "spike_mode",
)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state`; `path` holds either the old file or the complete new one, whatever happens.

    Raises:
        UserError: the file cannot be written (a full disk, missing rights); `path` is untouched.
    """
    try:
        with replacing(path, durable=True) as temporary, temporary.open("wb") as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError.
        reason = first_line(error)
        with contextlib.suppress(OSError):  # the folder may be what is missing
            reason += f" ({shutil.disk_usage(path.parent).free // 2**20} MiB free there)"
        raise UserError(f"cannot write checkpoint {path}: {reason}; files written before are untouched") from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a checkpoint file, tensors on the CPU. Never runs code from the file.

    Raises:
        UserError: no such file, no right to read it, a damaged file, one of another kind, or one that holds more than
            tensors and plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path}: is a folder; give a file in it")
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        # Published files carry their command line as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is not a file of tensors and plain data, and is not loaded, because reading it "
            f"could run code from it ({first_line(error)})"
        ) from error
    except PermissionError as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror}); check the rights there") from error
    except Exception as error:
        # Bytes that are no checkpoint raise many kinds of error: a text file ends in an IndexError.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"checkpoint {path} is damaged or no PyTorch file ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}; expected a dictionary of weights")
    return content


def weights_in(checkpoint: Mapping[str, Any], path: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without the `module.` prefix that data-parallel training adds.

    Raises:
        UserError: there is none, or no moving average when `use_ema` asks for it.
    """
    if use_ema:
        if "state_dict_ema" not in checkpoint:
            raise UserError(f"checkpoint {path} has no moving average of the weights (state_dict_ema)")
        weights = checkpoint["state_dict_ema"]
    else:
        weights = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(weights, Mapping) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"checkpoint {path} has no 'state_dict' (keys: {', '.join(map(str, checkpoint))})")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def load_weights(
    model: nn.Module,
    path: str | Path,
    use_ema: bool = False,
    fresh: tuple[str, ...] = (),
    content: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Load the weights in `path` into `model`, all of them or none, and return the whole checkpoint.

    Args:
        use_ema: load the moving average of the weights.
        fresh: keys that start with one of these may all be missing in the file; those of the model then stay, which the
            log says.
        content: what `read_checkpoint(path)` returned, where it was read before.

    Raises:
        UserError: the file cannot be read, or its keys or shapes are not the model's; the message lists the
            difference.
    """
    checkpoint = read_checkpoint(path) if content is None else content
    weights = weights_in(checkpoint, path, use_ema)
    if not any(_SPLIT in key for key in model.state_dict()):
        # The additional statistics of split BatchNorm are for training on augmented copies only.
        weights = {key: value for key, value in weights.items() if _SPLIT not in key}
    missing = {key: value for key, value in model.state_dict().items() if fresh and key.startswith(fresh)}
    if missing and not missing.keys() & weights.keys():
        weights |= missing
        _logger.info(f"{path} has no {', '.join(missing)}: they start fresh")
    load_fitting(model, weights, checkpoint, path)
    return checkpoint


class TrainedWith(NamedTuple):
    """What a file says about the model in it."""

    time_steps: int | None  # None where the file does not say
    second_head: bool  # for distillation
    published: bool  # in the form of the authors' files of V2


def trained_with(checkpoint: Mapping[str, Any], path: str | Path) -> TrainedWith:
    """What the file says: this project's `config`, or the command line (`args`) that published files of V2 carry.

    Raises:
        UserError: there are no weights.
    """
    given, args = checkpoint.get("config"), checkpoint.get("args")
    steps = given.get("time_steps") if isinstance(given, Mapping) else getattr(args, "time_steps", None)
    second = any(key.startswith("head_kd.") for key in weights_in(checkpoint, path))
    published = isinstance(args, argparse.Namespace) and "model" in checkpoint
    return TrainedWith(steps if isinstance(steps, int) and steps > 0 else None, second, published)


def load_fitting(
    model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Mapping[str, Any], path: str | Path
) -> None:
    """Load `weights`, which are those of `checkpoint`, into `model`: all of them or none.

    Raises:
        UserError: their keys or shapes are not the model's; the message lists the difference, and says what the
            checkpoint was trained with, where it holds that.
    """
    if difference := key_difference(model.state_dict(), weights):
        config = checkpoint.get("config")
        known = [f"{name} {config[name]}" for name in _SIZES if name in config] if isinstance(config, Mapping) else []
        remedy = f"give {', '.join(known)}, as it was trained with" if known else "give the settings of its training"
        raise UserError(f"checkpoint {path} does not fit the model, nothing was loaded; {remedy}:\n{difference}")
    model.load_state_dict(weights, strict=True)


def key_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], limit: int = 5) -> str:
    """What differs in keys and shapes, in a few lines; empty when nothing does."""
    shapes = [
        f"{key}: {list(found[key].shape)} in the file, {list(value.shape)} in the model"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    groups = (
        ("missing in the file", [key for key in expected if key not in found]),
        ("unknown to the model", [key for key in found if key not in expected]),
        ("of another shape", shapes),
    )
    lines = []
    for title, keys in groups:
        if keys:
            more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
            lines.append(f"  {len(keys)} {title}: {'; '.join(keys[:limit])}{more}")
    return "\n".join(lines)
