"""Whether a saved optimizer state fits the parameters: every moment is there, of its shape, and finite."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from utils.errors import UserError
from utils.train.saved_state import SavedState

_REMEDY = "take another checkpoint, or add --no-resume-opt, which starts the optimizer anew"


def load_moments(optimizer: Optimizer, saved: Mapping[str, Any], state: SavedState, path: Path) -> None:
    """Load the optimizer state `saved` of the checkpoint at `path`.

    Which moments each parameter has, and their shapes, is found by one update of a copy. A parameter that the file has
    no moments of must be one that is never updated: that is checked at the first update.

    Args:
        state: all fields of the checkpoint.

    Raises:
        UserError: groups, moments or shapes differ, or a value is not finite.
    """
    here, there = ([len(g["params"]) for g in groups] for groups in (optimizer.param_groups, saved["param_groups"]))
    if here != there:
        raise UserError(
            f"checkpoint {path}: its optimizer has groups of {there} parameters, the model's of {here}; {_REMEDY}"
        )
    trial = _after_an_update(optimizer)
    expected: dict[int, dict[str, Any]] = trial["state"]
    moments = {key: values for key, values in saved["state"].items() if values}
    if not moments and any(expected.values()) and state.steps_done and not state.amp_scaler:
        # Loss scaling may have left out all updates until then.
        raise UserError(f"checkpoint {path}: its optimizer has no moments after {_place(state)}; {_REMEDY}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in moments.items():
        if number not in expected:
            raise UserError(f"checkpoint {path}: it has moments of parameter {number}, which is none; {_REMEDY}")
        # Some moments begin after several updates; all of those are like the parameter.
        later = [name for name, value in values.items() if isinstance(value, Tensor) and value.dim()]
        for name, there_is in (dict.fromkeys(later, parameters[number]) | expected[number]).items():
            if reason := _why_not(values.get(name), there_is):
                raise UserError(
                    f"checkpoint {path}: {name!r} of the optimizer's parameter {number} {reason}; {_REMEDY}"
                )
    if moments:
        _check_counts(optimizer, saved, trial, path)
    optimizer.load_state_dict({"state": saved["state"], "param_groups": saved["param_groups"], **_more(saved)})
    if moments:
        _check_at_the_first_update(optimizer, path)


def _more(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if key not in ("state", "param_groups")}


def _place(state: SavedState) -> str:
    epoch, steps = state.position
    return f"epoch {epoch + 1}, step {steps}" if steps else f"epoch {epoch}"


def _own(optimizer: Optimizer) -> Optimizer:
    """The optimizer that has the moments: timm's Lookahead hands over to another one."""
    found = getattr(optimizer, "_base_optimizer", optimizer)
    assert isinstance(found, Optimizer)
    return found


def _after_an_update(optimizer: Optimizer) -> dict[str, Any]:
    trial = copy.deepcopy(_own(optimizer))
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    trial.step()
    return trial.state_dict()


def _check_counts(optimizer: Optimizer, saved: Mapping[str, Any], trial: Mapping[str, Any], path: Path) -> None:
    """Check what updates write into the groups: LAMB counts its updates there."""
    for number, group in enumerate(trial["param_groups"]):
        for name in group.keys() - optimizer.param_groups[number].keys() - {"params"}:
            value = saved["param_groups"][number].get(name)
            # A number may become a tensor: an optimizer may count on its device.
            reason = "" if type(value) in (int, float) and value >= 0 else _why_not(value, group[name])
            if reason:
                raise UserError(f"checkpoint {path}: {name!r} of the optimizer's group {number} {reason}; {_REMEDY}")


def _why_not(value: Any, expected: Any) -> str:
    """Why a value cannot stand for one like `expected`; empty where it can."""
    if not isinstance(expected, Tensor):
        right = expected is None or isinstance(value, type(expected)) or {type(value), type(expected)} == {int, float}
        return "" if right else f"is of type {type(value).__name__}, expected {type(expected).__name__}"
    if not isinstance(value, Tensor):
        return "is missing" if value is None else f"is of type {type(value).__name__}, expected a tensor"
    if value.shape != expected.shape:
        return f"has the shape {list(value.shape)}, expected {list(expected.shape)}"
    plain = value.layout is torch.strided and not value.is_meta
    if not plain or value.is_floating_point() != expected.is_floating_point():
        return f"is of {value.dtype}, {value.layout}, {value.device}, expected {expected.dtype} with values"
    return "" if bool(torch.isfinite(value).all()) else "is NaN or infinite"


def _check_at_the_first_update(optimizer: Optimizer, path: Path) -> None:
    def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        handle.remove()
        number = -1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None and parameter not in optimizer.state:
                    raise UserError(f"checkpoint {path}: the optimizer's parameter {number} has no moments; {_REMEDY}")

    handle = _own(optimizer).register_step_pre_hook(check)
