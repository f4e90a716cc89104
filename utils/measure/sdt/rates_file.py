"""Energy from firing rates alone: a file of rates, charged in every reading of the published formula.

The format is part of report.json's: `model` (sizes), `tensors` (name and rate per step), and optionally `title`,
`source` and `published` (`spiking_mJ`, `ann_mJ`). A report.json of a measurement is such a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from utils.errors import UserError, shortened
from utils.measure.energy import Cost, EnergyReport
from utils.measure.sdt.ann_twin import compare
from utils.measure.sdt.paper_energy import PAPER_READING, READINGS, Reading, check_rates, paper_energy
from utils.measure.sdt.shape import SdtShape
from utils.measure.twin import Comparison
from utils.schema import Finite, Record, Text, read_json


@dataclass(frozen=True)
class RatesFile:
    """What a file of rates holds."""

    title: str
    source: str
    shape: SdtShape
    rates: dict[str, list[float]]
    time_steps: int
    published: dict[str, float] = field(default_factory=dict)


class _Tensor(Record):
    name: Text
    rate: list[Finite]


class _Content(Record):
    model: dict[str, Any]
    tensors: list[_Tensor]
    title: Text | None = None
    source: Text | None = None
    published: dict[str, Annotated[Finite, Field(gt=0)]] | None = None


def read_rates(path: str) -> RatesFile:
    """Read and check a file of rates.

    Raises:
        UserError: it is missing, no JSON, or sizes or rates are missing or impossible.
    """
    place, remedy = f"from_rates: {path}", "docs/energy.md shows such a file"
    try:
        content = read_json(_Content, Path(path), place, remedy)
    except FileNotFoundError as error:
        raise UserError(f"{place}: no such file; give a JSON file of rates") from error
    shape = SdtShape.read(content.model, place)
    rates: dict[str, list[float]] = {}
    for number, tensor in enumerate(content.tensors):
        if tensor.name in rates:
            raise UserError(f"{place}: tensors.{number} is a second {shortened(tensor.name)}; give each tensor once")
        rates[tensor.name] = tensor.rate
    T = check_rates(shape, rates, place)
    title, source = content.title or Path(path).stem, content.source or path
    return RatesFile(title, source, shape, rates, T, content.published or {})


@dataclass(frozen=True)
class ChargedRates:
    """The energy of a file of rates in every reading of the published formula."""

    file: RatesFile
    cost: Cost
    readings: list[tuple[Reading, EnergyReport]]

    @property
    def chosen(self) -> EnergyReport:
        """The reading that the paper mode uses, with its layers."""
        return next(report for reading, report in self.readings if reading == PAPER_READING)

    @property
    def layer_macs(self) -> int:
        """Multiply-accumulates of all Conv and Linear layers in one step."""
        return sum(self.file.shape.macs().values())

    def compare(self, convention: str, report: EnergyReport | None = None) -> Comparison:
        """The ANN twin beside a reading, by default the chosen one."""
        return compare(self.file.shape, report or self.chosen, convention)


def charge(path: str, cost: Cost) -> ChargedRates:
    """Read the file and charge it in every reading. Raises UserError as `read_rates` does."""
    file = read_rates(path)
    return ChargedRates(file, cost, [(one, paper_energy(file.shape, file.rates, one, cost)) for one in READINGS])
