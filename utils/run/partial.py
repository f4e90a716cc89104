"""Start a run from those weights of a checkpoint that fit: after a part was changed, or the number of classes."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from utils.errors import UserError
from utils.run.checkpoint import read_checkpoint
from utils.run.weights import check_values, key_difference, weights_in

_logger = logging.getLogger("sdt")


def load_partial(model: nn.Module, path: str | Path) -> None:
    """Load from `path` each tensor whose name and shape are the model's, and log which ones are not.

    Raises:
        UserError: the file cannot be read, no parameter fits, or values cannot be weights; nothing was loaded then.
    """
    weights, expected = weights_in(read_checkpoint(path), path), model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in expected and v.shape == expected[k].shape}
    difference = key_difference(expected, weights)
    if not fitting.keys() & {name for name, _ in model.named_parameters()}:
        raise UserError(f"initial_partial: no parameter in {path} fits the model by name and shape:\n{difference}")
    check_values(expected, fitting, path)
    model.load_state_dict(fitting, strict=False)
    rest = f"; the others keep their initial values:\n{difference}" if difference else ", which is all"
    _logger.info(f"initial_partial: {len(fitting)} of {len(expected)} tensors are from {path}{rest}")
