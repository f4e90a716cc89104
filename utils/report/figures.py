"""The figures of a report: firing rates and energy of a model, a sweep over time steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from utils.measure.compared import Compared
from utils.measure.energy import EnergyReport, EnergyRow
from utils.measure.firing import FiringRow
from utils.measure.sweep import SweepPoint
from utils.report.pictures import Picture, picture_of
from utils.report.tables import energy as energy_text
from utils.run.plot_style import BLUE, GREEN, GREY, ORANGE, VERMILION, plain

_MARKERS = "os^Dv"
_STEP_COLOURS = [BLUE, ORANGE, GREEN, VERMILION]


def _label(row: FiringRow | EnergyRow) -> str:
    return f"{row.name}   ({row.paper_name})" if row.paper_name else row.name


def draw_firing_rates(rows: list[FiringRow], target: Path, title: str) -> None:
    """Draw the firing rate of every spike tensor, one mark per time step and a bar for the mean."""
    figure = Figure(figsize=(8, 0.8 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row.mean_rate for row in rows], color="#C9D6E2", height=0.7, label="mean over time")
    steps = len(rows[0].spikes)
    for t in range(steps):
        colour = _STEP_COLOURS[t % len(_STEP_COLOURS)]
        label = f"t = {t + 1}" if steps <= len(_STEP_COLOURS) else None
        axes.plot([row.rate[t] for row in rows], places, "o", color=colour, markersize=3.5, label=label)
    axes.set_yticks(places, [_label(row) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set(title=title, xlabel="firing rate (spikes per element and time step)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside all the marks
    plain(axes)
    figure.savefig(target, dpi=150)


def draw_energy(report: EnergyReport, target: Path, title: str) -> None:
    """Draw the energy of every layer, coloured by what its operations are."""
    rows = report.rows
    figure = Figure(figsize=(8, 1.0 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    unit, factor = ("mJ", 1e9) if report.total_pJ >= 1e9 else ("µJ", 1e6)
    for kind, colour, label in (("MAC", VERMILION, "multiply and add (MAC)"), ("AC", BLUE, "additions (AC)")):
        places = [i for i, row in enumerate(rows) if row.kind == kind]
        if places:
            axes.barh(places, [rows[i].energy_pJ / factor for i in places], color=colour, height=0.7, label=label)
    for i, row in enumerate(rows):
        share = f"  {row.energy_pJ / (report.total_pJ or 1):.1%}"
        axes.text(row.energy_pJ / factor, i, share, va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    figure.suptitle(f"{title}, {energy_text(report.total_pJ)} per sample\n{report.accounting}", fontsize=9)
    axes.set_xlabel(f"energy per sample ({unit})")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside all the marks
    plain(axes)
    figure.savefig(target, dpi=150)


def draw_comparison(rows: Sequence[Compared]) -> Picture:
    """Draw accuracy over energy and over latency, a mark per network, and a line through those that no other one beats
    in both."""
    factor, unit = (1.0, "mJ") if max(row.energy_mJ for row in rows) >= 1 else (1e3, "µJ")
    energies: list[float | None] = [factor * row.energy_mJ for row in rows]
    panels = [(f"energy per sample ({unit}, {rows[0].mode})", energies)]
    if any(row.latency_ms is not None for row in rows):
        panels.append(("latency of one sample (ms)", [row.latency_ms for row in rows]))
    figure = Figure(figsize=(4 * len(panels) + 2, 3.4), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        points = [(x, row.top1_percent) for x, row in zip(values, rows, strict=True)]
        axes.plot(*zip(*_front(points), strict=True), color=GREY, linewidth=1, linestyle=":", zorder=1)
        for i, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
            if x is not None:
                colour, marker = (
                    _STEP_COLOURS[i % len(_STEP_COLOURS)],
                    _MARKERS[i // len(_STEP_COLOURS) % len(_MARKERS)],
                )
                axes.plot(x, y, marker, color=colour, markersize=8, label=row.name)
        axes.set(xlabel=label, ylabel="top-1 (%)")
        axes.margins(0.12)
        axes.set_xlim(left=0)
        plain(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")
    return picture_of(figure, "comparison.png", dpi=130)


def _front(points: Sequence[tuple[float | None, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) with a higher accuracy than every cheaper one, from the cheapest on."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(((x, y) for x, y in points if x is not None), key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def draw_sweep(points: Sequence[SweepPoint], target: Path, title: str) -> None:
    """Draw accuracy, mean firing rate, energy and latency over the number of time steps."""
    steps = [point.time_steps for point in points]
    unit, factor = ("mJ", 1.0) if max(point.energy_mJ for point in points) >= 1 else ("µJ", 1e3)
    panels = (
        ("top-1 (%)", [point.top1_percent for point in points], VERMILION),
        ("mean firing rate", [point.mean_firing_rate for point in points], GREEN),
        (f"energy per sample ({unit})", [factor * point.energy_mJ for point in points], BLUE),
        ("latency of one sample (ms)", [point.latency_ms for point in points], ORANGE),
    )
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (label, values, colour) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot(steps, values, "o-", color=colour)
        axes.set(xlabel="time steps T", title=label)
        axes.set_xticks(steps)
        if label != "top-1 (%)":
            axes.set_ylim(bottom=0)
        plain(axes)
    figure.suptitle(f"{title} (energy: mode {points[0].mode}, first conv {points[0].first_conv})", fontsize=10)
    figure.savefig(target, dpi=150)
