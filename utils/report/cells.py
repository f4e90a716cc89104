"""What the tables of a report hold, for the terminal and for the page: header and rows of each, and lines below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from utils.measure.energy import DISCLAIMER, PJ_PER_MJ, EnergyReport
from utils.measure.family import Comparison
from utils.measure.measurement import Measured
from utils.measure.spread import INTERVAL, PerSample, Spread
from utils.measure.sweep import SweepPoint
from utils.report import tables


class Rates(Protocol):
    """A spike tensor with its firing rate at each time step."""

    @property
    def name(self) -> str: ...
    @property
    def paper_name(self) -> str: ...
    @property
    def rate(self) -> list[float]: ...
    @property
    def mean_rate(self) -> float: ...
    @property
    def mean_interval(self) -> tuple[float, float] | None: ...


def rate_cells(rows: Sequence[Rates]) -> tables.Cells:
    """The firing rates: per time step, their mean, and half of its 95% interval."""
    steps = max(len(row.rate) for row in rows)
    header = ["tensor (code)", "paper", *(f"t={t + 1}" for t in range(steps)), "mean", "± 95%"]
    body = []
    for row in rows:
        rates = [*(f"{rate:.4f}" for rate in row.rate), *["-"] * (steps - len(row.rate))]
        half = (row.mean_interval[1] - row.mean_interval[0]) / 2 if row.mean_interval else None
        body.append([row.name, row.paper_name, *rates, f"{row.mean_rate:.4f}", "" if half is None else f"{half:.4f}"])
    return _without_empty(header, body)


def layer_cells(report: EnergyReport) -> tables.Cells:
    """The layers, in order of computation."""
    header = ["layer", "paper", "kind", "MACs/step", "steps", "rate", "formula", "exact", "charged", "energy", "share"]
    rows = []
    for row in report.rows:
        known = [row.name, row.paper_name, row.kind, tables.count(row.macs_per_step), str(row.steps)]
        counted = [tables.count(n) for n in (row.formula_operations, row.exact_operations, row.operations)]
        energy = [tables.energy(row.energy_pJ), f"{row.energy_pJ / (report.total_pJ or 1.0):.1%}"]
        rows.append([*known, f"{row.mean_rate:.4f}", *counted, *energy])
    return _without_empty(header, rows)


def layer_lines(report: EnergyReport) -> list[str]:
    """What is to be said below the layers: notes, and the extras."""
    return [f"note: {note}" for note in report.notes] + [
        f"extra, not in the total: {row.name} {tables.energy(row.energy_pJ)} for {tables.count(row.operations)} × "
        f"{row.kind} ({row.charged})"
        for row in report.extras
    ]


def total_text(report: EnergyReport) -> str:
    """The total without the extras; "at least" where an operator has no price."""
    return f"{'at least ' if report.incomplete else ''}{tables.energy(report.total_pJ)}"


def with_extras_pJ(report: EnergyReport) -> float:
    """The total and the extras together."""
    return report.total_pJ + report.extras_mJ * PJ_PER_MJ


def total_cells(m: Measured) -> tables.Cells:
    """The totals in every accounting mode."""
    header = ["mode", "first conv", "MAC", "AC", "energy"]
    header += ["the ANN twin needs", "its self-attention needs"] if m.family else []
    rows = []
    for report in (m.energy, *m.others):
        cells = [report.with_form + report.mode, report.first_conv, tables.count(report.operations("MAC"))]
        cells += [tables.count(report.operations("AC")), total_text(report)]
        if twin := m.compare(report):
            cells += [tables.ratio(twin.ratio, 2), tables.ratio(twin.attention_ratio)]
        rows.append(cells)
    return header, rows


def total_lines(m: Measured) -> list[str]:
    """What is to be said below the totals: other totals, the twin, self-attention alone, costs."""
    lines = []
    if m.energy.other_first_conv_mJ is not None:
        other = tables.energy(m.energy.other_first_conv_mJ * PJ_PER_MJ)
        lines.append(f"with --first-conv {m.energy.other_first_conv}: {other} (mode {m.energy.mode})")
    if m.energy.extras:
        names = ", ".join(row.name for row in m.energy.extras)
        lines.append(f"with the extras ({names}): {tables.energy(with_extras_pJ(m.energy))} (mode {m.energy.mode})")
    if twin := m.compare(m.energy):
        lines += [
            f"ANN twin (the same layers with real values, one pass): {tables.count(twin.macs)} MACs = "
            f"{tables.energy(twin.energy_pJ)}, its attention counted as {twin.formula}",
            f"self-attention of the mean block (Q, K, V and f; no linear layer): {tables.energy(twin.attention_pJ)} in "
            f"the ANN, {tables.energy(twin.spiking_attention_pJ)} here (mode {m.energy.mode})",
        ]
    return [*lines, f"costs: {m.energy.cost}; {DISCLAIMER}"]


def spread_cells(spread: PerSample) -> tables.Cells:
    """How operations and energy differ between samples."""
    header = ["per sample", "mean", "standard deviation", "95% interval of the mean", "minimum", "maximum"]
    rows = [("operations", spread.operations, tables.count), ("energy", spread.energy_pJ, tables.energy)]
    return header, [[name, *_spread(found, text)] for name, found, text in rows]


def class_cells(spread: PerSample) -> tables.Cells:
    """The energy of the samples of each class."""
    header = ["class", "samples", "mean energy", "standard deviation", "95% interval of the mean", "minimum", "maximum"]
    return header, [
        [str(label), str(energy.samples), *_spread(energy, tables.energy)]
        for label, (_, energy) in spread.by_class.items()
    ]


def _spread(found: Spread, text: Callable[[float], str]) -> list[str]:
    sd = "-" if found.sd is None else text(found.sd)
    interval = " to ".join(map(text, found.mean_interval)) if found.mean_interval else "-"
    return [text(found.mean), sd, interval, text(found.minimum), text(found.maximum)]


def spread_lines(spread: PerSample) -> list[str]:
    """What is to be said below the spread."""
    return [f"most energy: sample {spread.worst} of the data set, counted from 0", INTERVAL]


def twin_note(m: Measured, twin: Comparison) -> str:
    """How many times the energy of the network the ANN twin needs, by operations alone and by the other models."""
    others = [(total.model.name, total.ratio()) for total in m.models if total.model.name != "compute"]
    told = ", ".join(f"{tables.ratio(ratio, 2)} by model {name}" for name, ratio in others if ratio is not None)
    with_memory = f"; with memory {told}" if told else ""
    return f"{tables.ratio(twin.ratio)} the energy of this network, compute only{with_memory}"


def mode_lines(m: Measured) -> list[str]:
    """What the modes mean."""
    known = ["exact: the operations that are needed", "formula: MACs × firing rate of the input of a layer"]
    return [*known, m.family.paper_mode] if m.family and m.family.paper_mode else known


def sweep_cells(points: list[SweepPoint]) -> tables.Cells:
    """The sweep over time steps."""
    rows = []
    for point in points:
        energy, latency = tables.energy(point.energy_mJ * PJ_PER_MJ), f"{point.latency_ms:.2f} ms"
        rate = tables.rate(point.mean_firing_rate, 4)
        rows.append([str(point.time_steps), f"{point.top1_percent:.2f}", rate, energy, latency])
    return ["T", "top-1 %", "mean firing rate", "energy", "latency per image"], rows


def part_cells(parts: Sequence[tuple[str, int, str, str]]) -> tables.Cells:
    """How each part of the model ran: kind of part, how many, what ran, why nothing faster."""
    header = ["part", "count", "runs as", "why not faster"]
    return _without_empty(header, [[part, str(count), runs, why] for part, count, runs, why in parts])


def copy_cells(m: Measured, facts: dict[str, Any]) -> tables.Cells:
    """The row of this measurement for a table in a paper."""
    header = ["model", "T", "top-1 (%)", "mean firing rate", "energy (mJ)", "accounting"]
    numbers = [
        facts["network"],
        str(m.counts.time_steps),
        f"{m.accuracy.top1:.2f}",
        tables.rate(m.mean_firing_rate, 4),
        f"{m.energy.total_mJ:.4g}",
        f"{'INCOMPLETE, ' if m.energy.incomplete else ''}{m.energy.with_form}{m.energy.mode}, first conv "
        f"{m.energy.first_conv}",
    ]
    if twin := m.compare(m.energy):
        header.append("ANN (mJ)")
        numbers.append(f"{twin.energy_mJ:.4g}")
    return header, [numbers]


def fact_cells(facts: dict[str, Any]) -> tables.Cells:
    """What was measured, and with which versions."""
    checkpoint = facts["checkpoint"]
    found = [
        ["checkpoint", f"{checkpoint['path']} (SHA-256 {checkpoint['sha256'][:16]}...)"],
        ["weights", "moving average" if facts["config"]["use_ema"] else "as trained"],
        ["git commit", facts["git_commit"]],
    ]
    return ["", ""], found + [[name, version] for name, version in facts["versions"].items()]


def _without_empty(header: list[str], rows: list[list[str]]) -> tables.Cells:
    """The table without columns in which no row has anything: a model without a paper has no names in one."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
