"""The fields of a checkpoint that a run goes on from, each checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic.types import Strict
from torch import Tensor

from utils.errors import UserError
from utils.schema import Count, Finite, Record, Text, checked

Number = Annotated[float, Strict()]  # a metric may be NaN or infinite
_Sum = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]


class Progress(Record):
    """How far an epoch is; the lists have one value for each process."""

    steps: Count
    loss_sums: list[Finite] = Field(min_length=1)
    samples: list[_Sum] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_for_each_process(self) -> Progress:
        if len(self.loss_sums) != len(self.samples):
            raise ValueError("loss_sums and samples differ in length")
        return self


class Group(Record):
    """One group of the optimizer's parameters: their numbers, and the learning rate; the rest is the settings'."""

    params: list[Count]
    lr: _Sum | Tensor


class OptimizerState(Record):
    """`state` is by number of the parameter."""

    state: dict[Count, dict[Text, Any]]
    param_groups: list[Group]


class Scaler(Record):
    """The state of loss scaling, as torch writes it."""

    scale: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
    growth_factor: Finite
    backoff_factor: Finite
    growth_interval: Count
    tracker: Count = Field(alias="_growth_tracker")


class Plateau(Record):
    """The state of the plateau schedule."""

    past: dict[Text, Any]
    restore_lr: Finite | list[Finite] | None


class SavedState(Record):
    """What a checkpoint holds beside the weights. Those of older versions and of timm lack some fields."""

    epoch: Count
    optimizer: OptimizerState
    progress: Progress | None = None
    history: list[tuple[Number, Count]] | None = None
    best: tuple[Number, Count] | None = None
    config: dict[Text, Any] | None = None
    amp_scaler: Scaler | Annotated[dict[Text, Any], Field(max_length=0)] | None = None
    plateau: Plateau | None = None
    parts: list[tuple[Any, Any, Any, Any]] | None = None

    @property
    def position(self) -> tuple[int, int]:
        """How far it is: the epoch to continue, and the steps done in it."""
        return (self.epoch, self.progress.steps) if self.progress else (self.epoch + 1, 0)

    @property
    def steps_done(self) -> bool:
        """Whether any training step was done."""
        return self.position > (0, 0)


def saved_state(content: Mapping[Any, Any], path: Path) -> SavedState:
    """The fields of a checkpoint that was read from `path`.

    Raises:
        UserError: it holds weights only, or a field is of another type or range.
    """
    if "optimizer" not in content or "epoch" not in content:
        raise UserError(
            f"checkpoint {path} holds weights only, without optimizer and epoch; add --no-resume-opt, or start a "
            "new run from it with --initial-checkpoint"
        )
    remedy = "the file is damaged or of another program: take another one, or its weights with --initial-checkpoint"
    return checked(SavedState, content, f"checkpoint {path}", remedy)
