"""The models of energy in a report: one row each, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence

from utils.measure.models.totals import ModelTotal
from utils.report import tables


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
