"""The report of firing_num.py: the sections for the terminal, report.json and layers.csv.

docs/energy.md describes report.json; under one schema name, fields may be added but not changed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.measure import firing
from utils.measure.energy import DISCLAIMER, EnergyReport, EnergyRow
from utils.measure.measurement import Measured
from utils.measure.sweep import SweepPoint
from utils.measure.verify import Verification
from utils.report import cells, tables
from utils.report.models import model_cells, model_lines
from utils.report.pictures import Picture

SCHEMA = "sdt-report/1"
_PART_KEYS = ("part", "count", "runs_as", "why_not_faster")


@dataclass
class Report:
    """Everything one run of firing_num.py found."""

    title: str
    measured: Measured
    facts: dict[str, Any]  # checkpoint, config, versions, commit
    verification: Verification | None = None
    sweep: list[SweepPoint] = field(default_factory=list)
    attention_maps: list[Picture] = field(default_factory=list)
    ratios: Picture | None = None  # of the models of energy, by firing rate; drawn with the files
    # How each part of the model ran: kind of part, how many, what ran, why nothing faster.
    parts: Sequence[tuple[str, int, str, str]] = ()

    def accuracy_line(self) -> str:
        found = self.measured.accuracy
        return (
            f"{found.samples} samples: top-1 {found.top1:.2f}%, top-5 {found.top5:.2f}%, loss {found.loss:.4f}; "
            f"{found.images_per_second:.0f} images/s with counting"
        )

    def sections(self) -> list[tuple[str, str]]:
        """Title and text of each section, for the terminal."""
        m = self.measured
        found = [("Accuracy", self.accuracy_line())]
        if m.firing:
            found.append(("Firing rates", tables.terminal(*cells.rate_cells(m.firing))))
        found.append((f"Operations and energy per sample ({m.energy.accounting})", energy_text(m.energy)))
        totals = tables.terminal(*cells.total_cells(m))
        found.append(("Totals per sample", "\n".join([totals, *cells.total_lines(m)])))
        if m.models:
            incomplete = " (INCOMPLETE, as the totals are)" if m.energy.incomplete else ""
            table = tables.terminal(*model_cells(m.models), left=1)
            found.append((f"Energy by model{incomplete}", "\n".join([table, *model_lines(m.models)])))
        if spread := m.energy.per_sample:
            lines = [tables.terminal(*cells.spread_cells(spread), left=1), *cells.spread_lines(spread)]
            found.append(("Spread between samples", "\n".join(lines)))
        if self.verification is not None:
            title = f"Spike-driven? ({self.verification.samples} samples)"
            found.append((title, "\n".join(self.verification.lines())))
        if self.sweep:
            found.append(("Sweep over time steps", tables.terminal(*cells.sweep_cells(self.sweep), left=0)))
        if self.parts:
            found.append(("How each part ran", tables.terminal(*cells.part_cells(self.parts), left=4)))
        if m.notes:
            found.append(("Notes", "\n".join(m.notes)))
        return found

    def as_dict(self) -> dict[str, Any]:
        m = self.measured
        accuracy, twin = m.accuracy, m.compare(m.energy)
        return {
            "schema": SCHEMA,
            "title": self.title,
            "samples": accuracy.samples,
            "top1_percent": accuracy.top1,
            "top5_percent": accuracy.top5,
            "loss": accuracy.loss,
            "time_steps": m.counts.time_steps,
            "mean_firing_rate": m.mean_firing_rate,
            "model": m.family and m.family.shape.as_dict(),
            "tensors": [firing.as_dict(row) for row in m.firing],
            "energy": energy_dict(m.energy),
            "totals": [total_dict(m, report) for report in (m.energy, *m.others)],
            "ann_twin": twin
            and dict(attention=twin.convention, macs=twin.macs, energy_mJ=twin.energy_mJ, ratio=twin.ratio),
            "self_attention": twin
            and dict(
                attention=twin.convention,
                ann_pJ_per_block=twin.attention_pJ,
                spiking_pJ_per_block=twin.spiking_attention_pJ,
                ratio=twin.attention_ratio,
            ),
            "energy_models": [total.as_dict() for total in m.models],
            "neurobench": m.neurobench.as_dict(),
            "verification": None
            if self.verification is None
            else asdict(self.verification) | {"passed": self.verification.passed},
            "sweep": [asdict(point) for point in self.sweep],
            "attention_maps": [picture.name for picture in self.attention_maps],
            "parts": [dict(zip(_PART_KEYS, part, strict=True)) for part in self.parts],
            "notes": m.notes,
            **self.facts,
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")


def energy_dict(report: EnergyReport) -> dict[str, Any]:
    """One accounting with all its layers."""

    def row_dict(row: EnergyRow) -> dict[str, Any]:
        return asdict(row) | {"mean_rate": row.mean_rate}

    return {
        "mode": report.mode,
        "first_conv": report.first_conv,
        "cost": asdict(report.cost),
        "disclaimer": DISCLAIMER,
        "total_mJ": report.total_mJ,
        "total_mJ_other_first_conv": report.other_first_conv_mJ,
        "extras_mJ": report.extras_mJ if report.extras else None,
        "mac_operations": report.operations("MAC"),
        "ac_operations": report.operations("AC"),
        "layers": [row_dict(row) for row in report.rows],
        "extras": [row_dict(row) for row in report.extras],
        "notes": report.notes,
        "incomplete": report.incomplete,
        "per_sample": report.per_sample and report.per_sample.as_dict(),
    }


def total_dict(m: Measured, report: EnergyReport) -> dict[str, Any]:
    """The totals of one accounting mode."""
    twin = m.compare(report)
    return {
        "mode": report.mode,
        "first_conv": report.first_conv,
        "mac_operations": report.operations("MAC"),
        "ac_operations": report.operations("AC"),
        "energy_mJ": report.total_mJ,
        "ann_ratio": twin and twin.ratio,
        "self_attention_ratio": twin and twin.attention_ratio,
    }


def energy_text(report: EnergyReport) -> str:
    """The layers, then notes and extras."""
    return "\n".join([tables.terminal(*cells.layer_cells(report), left=3), *cells.layer_lines(report)])


def write_layers_csv(path: Path, report: EnergyReport) -> None:
    """One line per layer and extra; the rate of each step in its own column."""
    steps = report.time_steps
    columns = ["layer", "paper_name", "type", "kind", "macs_per_step", "steps", "mean_rate"]
    columns += [f"rate_t{t + 1}" for t in range(steps)]
    columns += ["formula_operations", "exact_operations", "charged_operations", "energy_pJ", "mode", "charged"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in (*report.rows, *report.extras):
            rates = [*row.rate, *[""] * (steps - len(row.rate))]
            known = [row.name, row.paper_name, row.type, row.kind, row.macs_per_step or "", row.steps or ""]
            counted = [row.formula_operations, row.exact_operations, row.operations, row.energy_pJ]
            cells = [*known, row.mean_rate if row.rate else "", *rates, *("" if v is None else v for v in counted)]
            writer.writerow([*cells, report.mode, row.charged])
