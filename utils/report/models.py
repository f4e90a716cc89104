"""The models of energy in a report: a table for the terminal and the page, and the picture of ratios and rates."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from utils.measure.models.totals import ModelTotal
from utils.report import tables
from utils.report.pictures import Picture, picture_of
from utils.run.plot_style import BLUE, GREEN, ORANGE, VERMILION, plain

_COLOURS = (BLUE, VERMILION, GREEN, ORANGE)
_RATES = [10 ** (-3 + 3 * i / 60) for i in range(61)]  # 0.001 to 1


def model_cells(totals: Sequence[ModelTotal]) -> tables.Cells:
    """Header and rows: energy of the network and of its twins, ratios and break-even firing rates."""
    bits = totals[0].bits
    header = ["model", "this network"]
    twins = [(False, "ANN twin"), (True, f"{bits}-bit twin")] if totals[0].ann is not None else []
    header += [text for _, name in twins for text in (name, f"{name} / this", f"break-even with {name}")]
    rows = []
    for total in totals:
        cells = [total.model.name, tables.energy(total.snn_pJ)]
        for quantised, _ in twins:
            pJ, even = total.twin_pJ(quantised), total.break_even(quantised)
            cells += [tables.energy(pJ or 0.0), tables.ratio(total.ratio(quantised), 2)]
            cells.append("-" if even is None else even.cheaper if even.rate is None else f"{even.rate:.4f}")
        rows.append(cells)
    return header, rows


def model_lines(totals: Sequence[ModelTotal]) -> list[str]:
    """What each model prices, and what the words of the table mean."""
    lines = [f"{total.model.name}: {total.model.counts}" for total in totals]
    first = totals[0]
    if first.ann is not None:
        rate = tables.rate(first.firing_rate, 4)
        lines += [
            "/ this: how many times the energy of this network a twin needs; below 1 the twin needs less",
            f"break-even: mean firing rate below which this network needs less than the twin; here it is {rate}",
            f"{first.bits}-bit twin: activations of {first.bits} bits hold as many values as spikes in {_steps(first)}",
        ]
    return lines


def _steps(total: ModelTotal) -> str:
    return f"{total.time_steps} time step{'s' * (total.time_steps > 1)} can count"


def model_picture(totals: Sequence[ModelTotal], title: str) -> Picture | None:
    """How many times the energy of this network its twins need, over the mean firing rate; the measured rate marked.

    None where no twin is known or nothing fires.
    """
    shown = [total for total in totals if total.firing_rate and total.ratio() is not None]
    if not shown:
        return None
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, total in zip(_COLOURS, shown, strict=False):
        for quantised, line, fill in ((False, "-", colour), (True, "--", "none")):
            twin = f"{total.bits}-bit twin" if quantised else "ANN twin"
            ratios = [total.ratio(quantised, rate) or float("nan") for rate in _RATES]
            axes.plot(_RATES, ratios, line, color=colour, label=f"{total.model.name}, {twin}")
            here = [total.firing_rate or 0.0], [total.ratio(quantised) or 0.0]
            axes.plot(*here, "o", color=colour, markerfacecolor=fill, markersize=6)
    axes.axhline(1, color="grey", linewidth=1)
    axes.axvline(shown[0].firing_rate or 0.0, color="grey", linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="mean firing rate (all neurons in proportion; circles: this network)")
    axes.set(ylabel="energy of the twin / of this network", xlim=(_RATES[0], 1))
    axes.set_title(f"{title}\nabove 1 this network needs less, below 1 the twin", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain(axes)
    return picture_of(figure, "ratio.png", dpi=130)
