"""Energy from firing rates alone: a file of rates, charged in every reading of the published formula.

The format is part of report.json's: `model` (sizes), `tensors` (name and rate per step), and optionally `title`,
`source` and `published` (`spiking_mJ`, `ann_mJ`). A report.json of a measurement is such a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UserError
from utils.measure.energy import Cost, EnergyReport
from utils.measure.sdt.ann_twin import compare
from utils.measure.sdt.paper_energy import PAPER_READING, READINGS, Reading, check_rates, paper_energy
from utils.measure.sdt.shape import SdtShape
from utils.measure.twin import Comparison


@dataclass(frozen=True)
class RatesFile:
    """What a file of rates holds."""

    title: str
    source: str
    shape: SdtShape
    rates: dict[str, list[float]]
    time_steps: int
    published: dict[str, float] = field(default_factory=dict)


def read_rates(path: str) -> RatesFile:
    """Read and check a file of rates.

    Raises:
        UserError: it is missing, no JSON, or sizes or rates are missing or impossible.
    """
    place = f"from_rates: {path}"
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror}); give a JSON file of rates") from error
    except ValueError as error:
        raise UserError(f"{place}: no JSON ({error})") from error
    if not isinstance(content, dict) or not {"model", "tensors"} <= content.keys():
        raise UserError(f"{place}: needs 'model' (sizes) and 'tensors' (name and rate per step); see docs/energy.md")
    if not isinstance(content["model"], dict) or not isinstance(content["tensors"], list):
        raise UserError(f"{place}: 'model' must be an object and 'tensors' a list; see docs/energy.md")
    shape = SdtShape.read(content["model"], place)
    rates: dict[str, list[float]] = {}
    for entry in content["tensors"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "rate" not in entry:
            raise UserError(f"{place}: each entry of 'tensors' needs 'name' and 'rate', found {str(entry)[:60]}")
        if not isinstance(entry["rate"], list):
            raise UserError(f"{place}: rate of {entry['name']} must be a list with one value per time step")
        rates[entry["name"]] = entry["rate"]
    T = check_rates(shape, rates, place)
    published = content.get("published") or {}
    if not isinstance(published, dict) or not all(isinstance(v, (int, float)) and v > 0 for v in published.values()):
        raise UserError(f"{place}: 'published' must hold numbers above 0, as spiking_mJ: 4.5; found {published!r}")
    return RatesFile(content.get("title") or Path(path).stem, content.get("source") or path, shape, rates, T, published)


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
