"""Energy from firing rates alone: reading a file of rates, and the published figure beside its possible readings.

The format is part of report.json's: `model` (sizes), `tensors` (name and rate per step), and optionally `title`,
`source` and `published` (`spiking_mJ`, `ann_mJ`). A report.json of a measurement is such a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.measure.energy import DISCLAIMER, PJ_PER_MJ, Cost, EnergyReport
from utils.measure.sdt.ann_twin import ann_macs, ann_twin, attention_twin_pJ, compare_attention
from utils.measure.sdt.paper_energy import PAPER_READING, READINGS, Reading, check_rates, paper_energy
from utils.measure.sdt.shape import SdtShape
from utils.report.report import SCHEMA, energy_dict, energy_table, tables


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
class RatesReport:
    """The energy of a file of rates in every reading of the published formula."""

    file: RatesFile
    cost: Cost
    readings: list[tuple[Reading, EnergyReport]]

    @property
    def chosen(self) -> EnergyReport:
        """The reading that the paper mode uses, with its layers."""
        return next(report for reading, report in self.readings if reading == PAPER_READING)

    def sections(self) -> list[tuple[str, str]]:
        """Title and text of each section, for the terminal."""
        shape = self.file.shape
        return [
            ("Firing rates from", f"{self.file.title}\n{self.file.source}"),
            (f"Energy per layer ({self.chosen.accounting})", energy_table(self.chosen)),
            (f"Readings of the published formula ({self.cost}, {DISCLAIMER})", self._readings_text()),
            (
                f"ANN twin ({tables.count(sum(shape.macs().values()))} MACs in Conv and Linear layers)",
                self._twin_text(),
            ),
        ]

    def _readings_text(self) -> str:
        published = self.file.published.get("spiking_mJ")
        header = ["first conv", "convs 2 to 4", "position conv", "q, k, v", "mJ"]
        header += ["to published"] if published else []
        rows = []
        for reading, report in self.readings:
            about = "~" if reading.is_estimate else ""
            cells = [*reading.cells(), f"{about}{report.total_mJ:.3f}"]
            rows.append(cells + ([f"{report.total_mJ / published - 1:+.1%}"] if published else []))
        lines = [tables.terminal(header, rows, left=4)]
        if published:
            lines.append(f"published: {published:.2f} mJ. No reading gives it exactly.")
        lines.append("~ estimated: rates after the max-pools are not published, see docs/energy.md")
        return "\n".join(lines)

    def _twin_text(self) -> str:
        published = self.file.published.get("ann_mJ")
        lines = []
        for convention, formula in (("printed", "2 N^2 D, as printed"), ("paper", "2 N D^2")):
            energy = ann_macs(self.file.shape, convention) * self.cost.mac / PJ_PER_MJ
            beside = f" (published {published:.2f})" if published else ""
            attention = compare_attention(self.file.shape, self.chosen, convention)
            times = ann_twin(self.file.shape, self.chosen, convention).ratio
            lines.append(
                f"f(Q, K, V) = {formula}: {energy:.2f} mJ{beside}, {tables.ratio(times, 2)} the spiking "
                f"network; self-attention alone {tables.energy(attention.ann_pJ)} against "
                f"{tables.energy(attention.spiking_pJ)} per block = {tables.ratio(attention.ratio)}"
            )
        entering = paper_energy(self.file.shape, self.file.rates, READINGS[-1], self.cost)
        ratio = compare_attention(self.file.shape, entering, "printed").ratio
        lines.append(
            f"at the rates of what really enters q, k, v, and f as printed: self-attention {tables.ratio(ratio)}"
        )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        shape = self.file.shape
        return {
            "schema": SCHEMA,
            "title": self.file.title,
            "source": self.file.source,
            "published": self.file.published,
            "time_steps": self.file.time_steps,
            "model": shape.as_dict(),
            "tensors": [{"name": name, "rate": rate} for name, rate in self.file.rates.items()],
            "energy": energy_dict(self.chosen),
            "readings": [
                dict(
                    zip(("first_conv", "convs_2_to_4", "position_conv", "qkv"), reading.cells(), strict=True),
                    energy_mJ=report.total_mJ,
                    estimate=reading.is_estimate,
                )
                for reading, report in self.readings
            ],
            "ann_twin": {
                convention: {
                    "energy_mJ": ann_macs(shape, convention) * self.cost.mac / PJ_PER_MJ,
                    "self_attention_pJ_per_block": attention_twin_pJ(shape, convention, self.cost),
                }
                for convention in ("printed", "paper")
            },
        }


def report_rates(path: str, cost: Cost) -> RatesReport:
    """Read the file and charge it in every reading."""
    file = read_rates(path)
    readings = [(reading, paper_energy(file.shape, file.rates, reading, cost)) for reading in READINGS]
    return RatesReport(file, cost, readings)
