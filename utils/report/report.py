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
from utils.measure.energy import DISCLAIMER, PJ_PER_MJ, EnergyReport, EnergyRow
from utils.measure.firing import FiringRow
from utils.measure.measurement import Measured
from utils.measure.sweep import SweepPoint
from utils.measure.verify import Verification
from utils.report import tables
from utils.report.models import models_text

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
    attention_maps: list[str] = field(default_factory=list)  # file names
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
            found.append(("Firing rates", tables.terminal(*rate_cells(m.firing))))
        found.append((f"Operations and energy per sample ({m.energy.accounting})", energy_table(m.energy)))
        found.append(("Totals per sample", totals_text(m)))
        if m.models:
            found.append(("Energy by model", models_text(m.models)))
        if self.verification is not None:
            title = f"Spike-driven? ({self.verification.samples} samples)"
            found.append((title, "\n".join(self.verification.lines())))
        if self.sweep:
            found.append(("Sweep over time steps", tables.terminal(*sweep_cells(self.sweep), left=0)))
        if self.parts:
            found.append(("How each part ran", tables.terminal(*part_cells(self.parts), left=4)))
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
            "verification": None
            if self.verification is None
            else asdict(self.verification) | {"passed": self.verification.passed},
            "sweep": [asdict(point) for point in self.sweep],
            "attention_maps": self.attention_maps,
            "parts": [dict(zip(_PART_KEYS, part, strict=True)) for part in self.parts],
            "notes": m.notes,
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


def rate_cells(rows: Sequence[FiringRow]) -> tables.Cells:
    """Header and rows of the firing rates: per time step, their mean, and the mean rate of values that are not 0."""
    steps = max(len(row.nonzero) for row in rows)
    header = ["tensor (code)", "paper", *(f"t={t + 1}" for t in range(steps)), "mean", "non-zero"]
    body = []
    for row in rows:
        rates = [*(f"{rate:.4f}" for rate in row.rate), *["-"] * (steps - len(row.rate))]
        body.append([row.name, row.paper_name, *rates, *[f"{row.mean_rate:.4f}"] * 2])
    return _without_empty(header, body)


def layer_cells(report: EnergyReport) -> tables.Cells:
    """Header and rows of the layers, in order of computation."""
    header = ["layer", "paper", "kind", "MACs/step", "steps", "rate", "formula", "exact", "charged", "energy", "share"]
    rows = []
    for row in report.rows:
        known = [row.name, row.paper_name, row.kind, tables.count(row.macs_per_step), str(row.steps)]
        counted = [tables.count(n) for n in (row.formula_operations, row.exact_operations, row.operations)]
        energy = [tables.energy(row.energy_pJ), f"{row.energy_pJ / (report.total_pJ or 1.0):.1%}"]
        rows.append([*known, f"{row.mean_rate:.4f}", *counted, *energy])
    return _without_empty(header, rows)


def _without_empty(header: list[str], rows: list[list[str]]) -> tables.Cells:
    """The table without columns in which no row has anything: a model without a paper has no names in one."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


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
    header = ["mode", "first conv", "MAC", "AC", "energy"]
    header += ["ANN twin / this", "its self-attention / this"] if m.family else []
    rows = []
    for report in (m.energy, *m.others):
        cells = [report.mode, report.first_conv, tables.count(report.operations("MAC"))]
        cells += [tables.count(report.operations("AC")), tables.energy(report.total_pJ)]
        if twin := m.compare(report):
            cells += [tables.ratio(twin.ratio, 2), tables.ratio(twin.attention_ratio)]
        rows.append(cells)
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
    if twin := m.compare(m.energy):
        lines += [
            f"ANN twin: {tables.count(twin.macs)} MACs once = {tables.energy(twin.energy_pJ)}, its attention "
            f"counted as {twin.formula}",
            f"self-attention of the mean block (Q, K, V and f; no linear layer): {tables.energy(twin.attention_pJ)} in "
            f"the ANN, {tables.energy(twin.spiking_attention_pJ)} here (mode {m.energy.mode})",
        ]
    lines.append(f"costs: {m.energy.cost}; {DISCLAIMER}")
    return "\n".join(lines)


def part_cells(parts: Sequence[tuple[str, int, str, str]]) -> tables.Cells:
    """Header and rows of `Report.parts`."""
    header = ["part", "count", "runs as", "why not faster"]
    return _without_empty(header, [[part, str(count), runs, why] for part, count, runs, why in parts])


def sweep_cells(points: list[SweepPoint]) -> tables.Cells:
    """Header and rows of the sweep."""
    rows = []
    for point in points:
        energy, latency = tables.energy(point.energy_mJ * PJ_PER_MJ), f"{point.latency_ms:.2f} ms"
        rate = tables.rate(point.mean_firing_rate, 4)
        rows.append([str(point.time_steps), f"{point.top1_percent:.2f}", rate, energy, latency])
    return ["T", "top-1 %", "mean firing rate", "energy", "latency per image"], rows


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
