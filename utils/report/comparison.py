"""The report of firing_num.py --compare: several networks in one table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from utils.measure.compared import Compared
from utils.measure.energy import DISCLAIMER, PJ_PER_MJ
from utils.report import tables

SCHEMA = "sdt-comparison/1"


@dataclass(frozen=True)
class Comparison:
    """What `utils.measure.compared.compare` found."""

    rows: Sequence[Compared]

    @property
    def title(self) -> str:
        return f"{len(self.rows)} networks on {' and '.join(dict.fromkeys(row.dataset for row in self.rows))}"

    @property
    def subtitle(self) -> str:
        return f"energy in mode {self.rows[0].mode}, {DISCLAIMER}"

    def sections(self) -> list[tuple[str, str]]:
        """Title and text of the section, for the terminal."""
        text = [tables.terminal(*self.cells(), left=3), *self.lines()]
        found = [(f"{self.title} ({self.subtitle})", "\n".join(text))]
        if self.models:
            found.append(("Energy by model", tables.terminal(*self.model_cells(), left=1)))
        return found

    @property
    def models(self) -> list[str]:
        """The models of energy that have been computed for a network."""
        return list(dict.fromkeys(name for row in self.rows for name in row.models_mJ))

    def model_cells(self) -> tables.Cells:
        """The energy of each network by model."""
        return ["network", *self.models], [
            [row.name, *(_in_mJ(row.models_mJ.get(name)) for name in self.models)] for row in self.rows
        ]

    def cells(self) -> tables.Cells:
        """A row per network; data and first conv only where they differ."""
        columns = {
            "network": [row.name for row in self.rows],
            "model": [row.model for row in self.rows],
            "neuron": [row.neuron for row in self.rows],
            "T": [str(row.time_steps) for row in self.rows],
            "data": [row.dataset for row in self.rows],
            "parameters": [tables.count(row.parameters) for row in self.rows],
            "top-1 %": [f"{row.top1_percent:.2f}" for row in self.rows],
            "mean firing rate": [tables.rate(row.mean_firing_rate, 4) for row in self.rows],
            "first conv": [row.first_conv for row in self.rows],
            "energy": [_energy(row) for row in self.rows],
            "its ANN twin needs": [tables.ratio(row.ann_ratio, 2) for row in self.rows],
            "latency": [_latency(row) for row in self.rows],
        }
        shown = {
            header: column
            for header, column in columns.items()
            if header not in ("data", "first conv") or len(set(column)) > 1
        }
        return list(shown), [list(row) for row in zip(*shown.values(), strict=True)]

    def lines(self) -> list[str]:
        """What is to be said below the table."""
        lines = ["latency: one sample alone on this machine, the median; the networks take turns"]
        if any(row.latency_ms is None for row in self.rows):
            lines.append("latency '-': a report of an earlier measurement, whose machine may be another one")
        for what, values in (("data", "dataset"), ("numbers of samples", "samples"), ("first convs", "first_conv")):
            if len({getattr(row, values) for row in self.rows}) > 1:
                lines.append(f"not comparable without care: other {what} ({values})")
        lines += [f"INCOMPLETE: {row.name}, without {', '.join(row.incomplete)}" for row in self.rows if row.incomplete]
        return lines

    def sources(self) -> tables.Cells:
        """Where each network comes from."""
        return ["network", "file", "SHA-256 of the checkpoint"], [
            [row.name, row.path, f"{row.sha256[:16]}..." if row.sha256 else "-"] for row in self.rows
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "title": self.title,
            "networks": [asdict(row) for row in self.rows],
            "notes": self.lines(),
        }

    def write_csv(self, path: Path) -> None:
        """One line per network."""
        known = [f.name for f in fields(Compared) if f.name != "models_mJ"]
        columns = [*known, *(f"{model}_mJ" for model in self.models)]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in self.rows:
                values = asdict(row) | {"incomplete": "; ".join(row.incomplete)}
                values |= {f"{model}_mJ": row.models_mJ.get(model) for model in self.models}
                writer.writerow(["" if values[name] is None else values[name] for name in columns])


def _energy(row: Compared) -> str:
    return f"{'at least ' if row.incomplete else ''}{_in_mJ(row.energy_mJ)}"


def _in_mJ(value: float | None) -> str:
    return "-" if value is None else tables.energy(value * PJ_PER_MJ)


def _latency(row: Compared) -> str:
    return "-" if row.latency_ms is None else f"{row.latency_ms:.2f} ms"
