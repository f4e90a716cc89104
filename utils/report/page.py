"""Pages of firing_num.py: each is one file without scripts or network, light or dark as the browser asks.

What a page looks like is in templates/. This file fills them, and computes what their charts show.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.measure.energy import EnergyReport
from utils.report import cells, models, tables
from utils.report.cells import Rates

_MOST_KEYS = 8  # time steps that the legend of the firing rates names; of more, the first and the last


def write_page(path: Path, template: str, *, title: str, subtitle: str, **shown: Any) -> None:
    """Write the page that `template` makes of `shown`."""
    page = _environment().get_template(template).render(title=title, subtitle=subtitle, **shown)
    path.write_text(page, encoding="utf-8")


def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= dict(energy=tables.energy, ratio=tables.ratio, rate=tables.rate, data_uri=_data_uri)
    found.globals |= dict(cells=cells, models=models, tables=tables, energy_bars=energy_bars, rate_bars=rate_bars)
    return found


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


class Mark(NamedTuple):
    """A dot on a bar."""

    percent: float
    colour: str


class Bar(NamedTuple):
    """One line of a chart: names, a bar with dots on it, and the value in text."""

    name: str
    code: str  # the name in the code, where `name` is the paper's
    tip: str
    kind: str  # class of report.css
    percent: float  # of the width
    marks: Sequence[Mark]
    value: str
    share: str = ""


def energy_bars(report: EnergyReport) -> list[Bar]:
    """The energy of each layer."""
    top = max(row.energy_pJ for row in report.rows) or 1.0
    bars = []
    for row in report.rows:
        tip = f"{row.name}: {tables.count(row.operations)} {row.kind}, {row.charged}"
        share = f"{row.energy_pJ / (report.total_pJ or 1.0):.1%}"
        percent, value = 100 * row.energy_pJ / top, tables.energy(row.energy_pJ)
        bars.append(Bar(*_names(row), tip, row.kind.lower(), percent, (), value, share))
    return bars


class RateBars(NamedTuple):
    """Mean rates as bars, the rate of each time step as a dot; `keys`: (time step, colour) of the legend."""

    bars: list[Bar]
    keys: list[tuple[str, str]]
    top: float  # the rate that fills the width


def rate_bars(rows: Sequence[Rates]) -> RateBars:
    """The firing rate of each spike tensor."""
    steps = max(len(row.rate) for row in rows)
    top = max(max(row.rate) for row in rows) or 1.0
    colours = [_step_colour(t, steps) for t in range(steps)]
    bars = []
    for row in rows:
        marks = [Mark(100 * rate / top, colour) for rate, colour in zip(row.rate, colours, strict=False)]
        tip = f"{row.name}: " + ", ".join(f"t={t + 1} {rate:.4f}" for t, rate in enumerate(row.rate))
        bars.append(Bar(*_names(row), tip, "mean", 100 * row.mean_rate / top, marks, f"{row.mean_rate:.4f}"))
    shown = range(steps) if steps <= _MOST_KEYS else (0, steps - 1)
    return RateBars(bars, [(f"t = {t + 1}", colours[t]) for t in shown], top)


def _names(row: Any) -> tuple[str, str]:
    return (row.paper_name, row.name) if row.paper_name else (row.name, "")


def _step_colour(t: int, steps: int) -> str:
    share = 100 * t / max(1, steps - 1)
    return f"color-mix(in oklab, var(--late) {share:.0f}%, var(--early))"
