"""Checkpoints: written whole or not at all, read without running code, loaded with all keys or not at all.

A checkpoint is a dictionary in a file of `utils.torch_file`: `state_dict`, `epoch`, and where they exist
`state_dict_ema`, `optimizer`, `plateau`, `amp_scaler`, `metric`, `history`, `best`, `config`, `versions`, `git_commit`;
one from within an epoch also has `progress` (`utils.train.saved_state` has the form of each). Published files have the
same `state_dict`, with or without a `module.` prefix, or are the bare state dict.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from utils import torch_file
from utils.errors import UserError, first_line, shortened
from utils.files import replacing
from utils.run.model_folder import is_model_folder, read_model_folder
from utils.run.weights import check_values, key_difference, weights_in
from utils.torch_file import Proof

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
            torch_file.save(dict(state), file)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError.
        reason = first_line(error)
        with contextlib.suppress(OSError):  # the folder may be what is missing
            reason += f" ({shutil.disk_usage(path.parent).free // 2**20} MiB free there)"
        raise UserError(f"cannot write checkpoint {path}: {reason}; files written before are untouched") from error


def read_checkpoint(path: str | Path, *, say: bool = True) -> dict[Any, Any]:
    """The dictionary in a checkpoint file, tensors on the CPU. Never runs code from the file.

    Args:
        say: log a line where the file has no SHA-256 of its content.

    Raises:
        UserError: no such file, no right to read it, a damaged file, one of another kind, or one that holds more than
            tensors and plain data.
    """
    path = Path(path)
    if path.is_dir():
        if is_model_folder(path):
            return read_model_folder(path)
        raise UserError(f"checkpoint {path}: is a folder; give a file in it")
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    content, proof = torch_file.load(path, f"checkpoint {path}")
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}; expected a dictionary of weights")
    if say and proof is not Proof.SHA256:
        _logger.info(
            f"checkpoint {path} has no SHA-256 of its content, as files of other programs and of older versions: "
            f"what confirms that it is undamaged: {proof.value}"
        )
    return content


def settings_inside(path: str | Path) -> Mapping[Any, Any] | None:
    """The settings that a checkpoint was trained with, where it holds them; UserError as `read_checkpoint`."""
    config = read_checkpoint(path).get("config")
    return config if isinstance(config, Mapping) else None


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
        UserError: the file cannot be read, or its keys, shapes or values do not fit the model; the message lists the
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
    published = hasattr(args, "time_steps") and "model" in checkpoint
    return TrainedWith(steps if isinstance(steps, int) and steps > 0 else None, second, published)


def load_fitting(
    model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Mapping[str, Any], path: str | Path
) -> None:
    """Load `weights`, which are those of `checkpoint`, into `model`: all of them or none.

    Raises:
        UserError: their keys or shapes are not the model's; the message lists the difference, and says what the
            checkpoint was trained with, where it holds that. Or they are no numbers to compute with.
    """
    if difference := key_difference(model.state_dict(), weights):
        config = checkpoint.get("config")
        known = (
            [f"{name} {shortened(config[name])}" for name in _SIZES if name in config]
            if isinstance(config, Mapping)
            else []
        )
        remedy = f"give {', '.join(known)}, as it was trained with" if known else "give the settings of its training"
        raise UserError(f"checkpoint {path} does not fit the model, nothing was loaded; {remedy}:\n{difference}")
    check_values(model.state_dict(), weights, path)
    model.load_state_dict(weights, strict=True)
