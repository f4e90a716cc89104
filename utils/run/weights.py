"""Whether the tensors of a checkpoint are weights that a model can take: keys, shapes, kinds of numbers, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError, listed, shortened

_PREFIX = "module."
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def weights_in(checkpoint: Mapping[Any, Any], path: object, use_ema: bool = False) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without the `module.` prefix that data-parallel training adds.

    Raises:
        UserError: there is none, or no moving average when `use_ema` asks for it; or two of its keys are the same
            without the prefix.
    """
    if use_ema:
        if "state_dict_ema" not in checkpoint:
            raise UserError(f"checkpoint {path} has no moving average of the weights (state_dict_ema)")
        weights = checkpoint["state_dict_ema"]
    else:
        weights = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        keys = listed([key if isinstance(key, str) else shortened(key) for key in checkpoint])
        raise UserError(f"checkpoint {path} has no 'state_dict' (keys: {keys}); give a file of weights")
    if odd := [key for key in weights if not isinstance(key, str)]:
        raise UserError(
            f"checkpoint {path}: a key of its weights is {shortened(odd[0])}; the names of weights are texts"
        )
    names = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
    if len(names) < len(weights):
        twice = [key for key in weights if key.startswith(_PREFIX) and key.removeprefix(_PREFIX) in weights]
        raise UserError(
            f"checkpoint {path} has weights twice, with the prefix {_PREFIX!r} and without it: {listed(twice)}; "
            "remove one of each"
        )
    return names


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


def check_values(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: object) -> None:
    """Check that the tensors `found` in a file can stand for those of the same names in a model.

    Args:
        expected: the model's; of the same shapes.

    Raises:
        UserError: they hold numbers of another kind (integers or complex numbers for real ones), are not stored as
            plain tensors, or are NaN, infinite, or negative variances.
    """

    def refuse(keys: Iterable[str], what: str, remedy: str) -> None:
        if names := list(keys):
            raise UserError(f"checkpoint {path}, nothing was loaded: {listed(names)} {what}; {remedy}")

    def those(wrong: Callable[[str, Tensor], bool]) -> list[str]:
        return [key for key, value in found.items() if wrong(key, value)]

    plain = "save them as plain tensors of real numbers"
    refuse(those(lambda _, value: not _is_plain(value)), "is sparse, quantized or without values", plain)
    refuse(
        [f"{key} ({str(value.dtype).removeprefix('torch.')})" for key, value in found.items()
         if value.dtype not in (_REAL if expected[key].is_floating_point() else _WHOLE)],
        "has the wrong kind of numbers for the model",
        "weights are float16, bfloat16, float32 or float64, and counters are integers",
    )  # fmt: skip
    refuse(
        those(lambda key, value: not bool(torch.isfinite(value.to(expected[key].dtype)).all())),
        "has values that are NaN or infinite",
        "the training that wrote it has diverged, so take an earlier checkpoint",
    )
    refuse(
        those(lambda key, value: key.endswith("running_var") and bool((value < 0).any())),
        "has negative values, and no variance is negative",
        "the file is damaged, so take another one",
    )


def _is_plain(value: Tensor) -> bool:
    return value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
