"""What firing_num.py says: the sections for the terminal, report.json and layers.csv.

The schema of report.json is described in docs/energy.md; it only ever grows under one schema name.
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.measure import firing
from utils.measure.energy import DISCLAIMER, PJ_PER_MJ, EnergyReport, EnergyRow
from utils.measure.sdt.ann_twin import ann_twin, compare_attention
from utils.report import tables

if TYPE_CHECKING:
    from utils.measure.measurement import Measured
    from utils.measure.sweep import SweepPoint
    from utils.measure.verify import Verification

SCHEMA = "sdt-report/1"


@dataclass
class Report:
    """Everything one run of firing_num.py found."""

    title: str
    measured: Measured
    facts: dict[str, Any]  # checkpoint, config, versions, commit
    verification: Verification | None = None
    sweep: list[SweepPoint] = field(default_factory=list)
    attention_maps: list[str] = field(default_factory=list)  # file names

    def accuracy_line(self) -> str:
        found = self.measured.accuracy
        return (
            f"{found.samples} samples: top-1 {found.top1:.2f}%, top-5 {found.top5:.2f}%, loss {found.loss:.4f}; "
            f"{found.images_per_second:.0f} images/s with counting"
        )

    def sections(self) -> list[tuple[str, str]]:
        """Title and text of each section, for the terminal."""
        m = self.measured
        found = [
            ("Accuracy", self.accuracy_line()),
            ("Firing rates", tables.terminal(*firing.rate_cells(m.firing))),
            (f"Operations and energy per sample ({m.energy.accounting})", energy_table(m.energy)),
            ("Totals per sample", totals_text(m)),
        ]
        if self.verification is not None:
            title = f"Spike-driven? ({self.verification.samples} samples)"
            found.append((title, "\n".join(self.verification.lines())))
        if self.sweep:
            found.append(("Sweep over time steps", tables.terminal(*sweep_cells(self.sweep), left=0)))
        return found

    def as_dict(self) -> dict[str, Any]:
        m = self.measured
        accuracy = m.accuracy
        return {
            "schema": SCHEMA,
            "title": self.title,
            "samples": accuracy.samples,
            "top1_percent": accuracy.top1,
            "top5_percent": accuracy.top5,
            "loss": accuracy.loss,
            "time_steps": m.counts.time_steps,
            "mean_firing_rate": m.mean_firing_rate,
            "model": m.shape.as_dict(),
            "tensors": [firing.as_dict(row) for row in m.firing],
            "energy": energy_dict(m.energy),
            "totals": [total_dict(m, report) for report in (m.energy, *m.others)],
            "ann_twin": {
                "attention": m.twin.convention,
                "macs": m.twin.macs,
                "energy_mJ": m.twin.energy_mJ,
                "ratio": m.twin.ratio,
            },
            "self_attention": {
                "attention": m.attention.convention,
                "ann_pJ_per_block": m.attention.ann_pJ,
                "spiking_pJ_per_block": m.attention.spiking_pJ,
                "ratio": m.attention.ratio,
            },
            "verification": None
            if self.verification is None
            else asdict(self.verification) | {"passed": self.verification.passed},
            "sweep": [asdict(point) for point in self.sweep],
            "attention_maps": self.attention_maps,
            **self.facts,
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")


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
    }


def total_dict(m: Measured, report: EnergyReport) -> dict[str, Any]:
    """The totals of one accounting mode."""
    return {
        "mode": report.mode,
        "first_conv": report.first_conv,
        "mac_operations": report.operations("MAC"),
        "ac_operations": report.operations("AC"),
        "energy_mJ": report.total_mJ,
        "ann_ratio": ann_twin(m.shape, report, m.twin.convention).ratio,
        "self_attention_ratio": compare_attention(m.shape, report, m.twin.convention).ratio,
    }


def layer_cells(report: EnergyReport) -> tables.Cells:
    """Header and rows of the layers, in order of computation."""
    header = ["layer", "paper", "kind", "MACs/step", "steps", "rate", "formula", "exact", "charged", "energy", "share"]
    total = report.total_pJ or 1.0
    rows = [
        [
            row.name,
            row.paper_name,
            row.kind,
            tables.count(row.macs_per_step),
            str(row.steps),
            f"{row.mean_rate:.4f}",
            tables.count(row.formula_operations),
            tables.count(row.exact_operations),
            tables.count(row.operations),
            tables.energy(row.energy_pJ),
            f"{row.energy_pJ / total:.1%}",
        ]
        for row in report.rows
    ]
    return header, rows


def energy_table(report: EnergyReport) -> str:
    """The layers, then notes and extras."""
    notes = [f"note: {note}" for note in report.notes]
    notes += [
        f"extra, not in the total: {row.name} {tables.energy(row.energy_pJ)} for {tables.count(row.operations)} x "
        f"{row.kind} ({row.charged})"
        for row in report.extras
    ]
    return "\n".join([tables.terminal(*layer_cells(report), left=3), *notes])


def total_cells(m: Measured) -> tables.Cells:
    """Header and rows of the totals in every accounting mode."""
    header = ["mode", "first conv", "MAC", "AC", "energy", "ANN twin / this", "its self-attention / this"]
    rows = []
    for report in (m.energy, *m.others):
        total = total_dict(m, report)
        cells = [report.mode, report.first_conv, tables.count(report.operations("MAC"))]
        cells += [tables.count(report.operations("AC")), tables.energy(report.total_pJ)]
        rows.append([*cells, tables.ratio(total["ann_ratio"], 2), tables.ratio(total["self_attention_ratio"])])
    return header, rows


def totals_text(m: Measured) -> str:
    """The totals in every accounting mode, the twin, and self-attention alone."""
    lines = [tables.terminal(*total_cells(m))]
    if m.energy.other_first_conv_mJ is not None:
        other = tables.energy(m.energy.other_first_conv_mJ * PJ_PER_MJ)
        lines.append(f"with --first-conv {m.energy.other_first_conv}: {other} (mode {m.energy.mode})")
    if m.energy.extras:
        with_extras = m.energy.total_pJ + m.energy.extras_mJ * PJ_PER_MJ
        names = ", ".join(row.name for row in m.energy.extras)
        lines.append(f"with the extras ({names}): {tables.energy(with_extras)} (mode {m.energy.mode})")
    lines.append(
        f"ANN twin: {tables.count(m.twin.macs)} MACs once = {tables.energy(m.twin.energy_pJ)}, its attention "
        f"counted as {m.twin.formula}"
    )
    lines.append(
        f"self-attention of the mean block (Q, K, V and f; no linear layer): {tables.energy(m.attention.ann_pJ)} in "
        f"the ANN, {tables.energy(m.attention.spiking_pJ)} here (mode {m.energy.mode})"
    )
    lines.append(f"costs: {m.energy.cost}; {DISCLAIMER}")
    return "\n".join(lines)


def sweep_cells(points: list[SweepPoint]) -> tables.Cells:
    """Header and rows of the sweep."""
    header = ["T", "top-1 %", "mean firing rate", "energy", "latency per image"]
    rows = [
        [
            str(point.time_steps),
            f"{point.top1_percent:.2f}",
            f"{point.mean_firing_rate:.4f}",
            tables.energy(point.energy_mJ * PJ_PER_MJ),
            f"{point.latency_ms:.2f} ms",
        ]
        for point in points
    ]
    return header, rows


def write_layers_csv(path: Path, report: EnergyReport) -> None:
    """One line per layer and extra; the rate of each step in its own column."""
    steps = report.time_steps
    columns = ["layer", "paper_name", "type", "kind", "macs_per_step", "steps", "mean_rate"]
    columns += [f"rate_t{t + 1}" for t in range(steps)]
    columns += ["formula_operations", "exact_operations", "charged_operations", "energy_pJ", "mode", "charged"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in (*report.rows, *report.extras):
            rates = [*row.rate, *[""] * (steps - len(row.rate))]
            known = [row.name, row.paper_name, row.type, row.kind, row.macs_per_step or "", row.steps or ""]
            counted = [row.formula_operations, row.exact_operations, row.operations, row.energy_pJ]
            cells = [*known, row.mean_rate if row.rate else "", *rates, *("" if v is None else v for v in counted)]
            writer.writerow([*cells, report.mode, row.charged])
