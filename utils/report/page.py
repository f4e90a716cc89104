"""report.html: one page in one file, without scripts or network, pictures inside; light or dark as the browser asks.

Charts are HTML boxes with sizes in percent, so that they fit any width and stay text.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from utils.measure.energy import PJ_PER_MJ, EnergyReport, EnergyRow
from utils.measure.firing import FiringRow
from utils.measure.verify import Verification
from utils.report import tables
from utils.report.report import Report, layer_cells, part_cells, rate_cells, sweep_cells, total_cells

_E = html.escape


def write_html(path: Path, report: Report) -> None:
    """Write the page; attention maps are read from `path`'s folder."""
    m = report.measured
    accuracy = m.accuracy
    first_conv = m.energy.first_conv
    tiles = [
        (f"{accuracy.top1:.2f}%", f"top-1 of {accuracy.samples:,} samples"),
        (tables.energy(m.energy.total_pJ), f"per sample, mode {m.energy.mode}, first conv {first_conv}"),
        (tables.rate(m.mean_firing_rate, 3), f"mean firing rate, T = {m.counts.time_steps}"),
    ]
    if twin := m.compare(m.energy):
        tiles.append((tables.ratio(twin.ratio), f"energy of the ANN twin ({tables.energy(twin.energy_pJ)})"))
    sections = {
        "Operations and energy": _totals(report),
        "Energy by layer": _energy_chart(m.energy) if m.energy.rows else "",
        "Firing rates": _rate_chart(m.firing) if m.firing else "",
        "Attention maps": _maps(report, path.parent) if report.attention_maps else "",
        "Time steps": _table(*sweep_cells(report.sweep)) if report.sweep else "",
        "Proof": _proof(report.verification) if report.verification else "",
        "How each part ran": _table(*part_cells(report.parts)) if report.parts else "",
        "Notes": "".join(f"<p>{_E(note)}</p>" for note in m.notes),
        "To copy": _to_copy(report),
        "This run": _table(["", ""], _provenance(report)),
    }
    parts = [
        f"<header><h1>{_E(report.title)}</h1><p>{_E(_subtitle(report))}</p></header>",
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{_E(value)}</b><span>{_E(text)}</span></div>' for value, text in tiles)
        + "</div>",
        *(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items() if content),
    ]
    style = files("utils.report").joinpath("report.css").read_text()
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_E(report.title)}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _subtitle(report: Report) -> str:
    m = report.measured
    return f"{m.family.shape.description + ', ' if m.family else ''}T = {m.counts.time_steps}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_E(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_E(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    shown = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="scroll"><table>{shown}<tbody>{body}</tbody></table></div>'


def _all_numbers(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<details><summary>All numbers</summary>{_table(header, rows)}</details>"


def _totals(report: Report) -> str:
    m = report.measured
    modes = "exact: the operations that are needed. formula: MACs x firing rate of the input of a layer."
    notes = [f"Per sample. Costs: {m.energy.cost}. Compute only, not measured power.", modes]
    if m.family and (twin := m.compare(m.energy)):
        notes[1] += f" {m.family.paper_mode}"
        notes.append(f"ANN twin: the same layers with real values, one pass, attention counted as {twin.formula}.")
    notes += m.energy.notes
    if m.energy.other_first_conv_mJ is not None:
        other = tables.energy(m.energy.other_first_conv_mJ * PJ_PER_MJ)
        notes.insert(1, f"With first conv {m.energy.other_first_conv}: {other}.")
    notes += [f"Not in the total: {r.name} {tables.energy(r.energy_pJ)} ({r.charged})." for r in m.energy.extras]
    return _table(*total_cells(m)) + "".join(f'<p class="note">{_E(note)}</p>' for note in notes)


def _energy_chart(report: EnergyReport) -> str:
    top = max(row.energy_pJ for row in report.rows) or 1.0
    lines = []
    for row in report.rows:
        tip = f"{row.name}: {tables.count(row.operations)} {row.kind}, {row.charged}"
        share = f"{row.energy_pJ / (report.total_pJ or 1.0):.1%}"
        value = f"{_E(tables.energy(row.energy_pJ))} <em>{share}</em>"
        lines.append(_bar(row, tip, row.kind.lower(), row.energy_pJ / top, "", value))
    legend = '<p class="legend"><i class="key ac"></i>additions (AC) <i class="key mac"></i>multiply and add (MAC)</p>'
    return legend + f'<div class="chart">{"".join(lines)}</div>{_all_numbers(*layer_cells(report))}'


def _rate_chart(rows: Sequence[FiringRow]) -> str:
    steps = max(len(row.rate) for row in rows)
    top = max(max(row.rate) for row in rows) or 1.0
    lines = []
    for row in rows:
        dots = "".join(
            f'<i class="dot" style="left:{100 * rate / top:.2f}%;background:{_step_colour(t, steps)}"></i>'
            for t, rate in enumerate(row.rate)
        )
        tip = f"{row.name}: " + ", ".join(f"t={t + 1} {rate:.4f}" for t, rate in enumerate(row.rate))
        lines.append(_bar(row, tip, "mean", row.mean_rate / top, dots, f"{row.mean_rate:.4f}"))
    shown = [0, steps - 1] if steps > 8 else list(range(steps))
    keys = " ".join(f'<i class="key round" style="background:{_step_colour(t, steps)}"></i>t = {t + 1}' for t in shown)
    legend = f'<p class="legend"><i class="key mean"></i>mean over time {keys}; full width is {top:.3f}</p>'
    return legend + f'<div class="chart">{"".join(lines)}</div>{_all_numbers(*rate_cells(rows))}'


def _bar(row: EnergyRow | FiringRow, tip: str, kind: str, width: float, marks: str, value: str) -> str:
    """One line of a chart: the name, a bar of `width` 0 to 1 with marks on it, the value."""
    name = f"{_E(row.paper_name)} <small>{_E(row.name)}</small>" if row.paper_name else _E(row.name)
    bar = f'<i class="bar {kind}" style="width:{100 * width:.2f}%"></i>{marks}'
    return (
        f'<div class="row" title="{_E(tip)}"><span class="name">{name}</span><span class="track">{bar}</span>'
        f'<span class="value">{value}</span></div>'
    )


def _step_colour(t: int, steps: int) -> str:
    share = 100 * t / max(1, steps - 1)
    return f"color-mix(in oklab, var(--late) {share:.0f}%, var(--early))"


def _maps(report: Report, folder: Path) -> str:
    shown = []
    for name in report.attention_maps:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        alt = "input, V_S and masked V_S of each block"
        shown.append(f'<div class="scroll"><img alt="{alt}" src="data:image/png;base64,{data}"></div>')
    note = (
        "Firing rate per token of V_S and of masked V_S, averaged over time and heads, over the input; each map is "
        "scaled to its own maximum, written below it."
    )
    return f'<p class="note">{note}</p>' + "".join(shown)


def _proof(found: Verification) -> str:
    good = "Spike-driven" if found.passed else "NOT spike-driven"
    return f"<p><b>{good}</b>, on {found.samples} samples:</p><p>{'<br>'.join(map(_E, found.lines()))}</p>"


def _to_copy(report: Report) -> str:
    m = report.measured
    header = ["model", "T", "top-1 (%)", "mean firing rate", "energy (mJ)", "accounting"]
    numbers = [
        m.family.shape.title if m.family else report.facts["config"]["model"],
        str(m.counts.time_steps),
        f"{m.accuracy.top1:.2f}",
        tables.rate(m.mean_firing_rate, 4),
        f"{m.energy.total_mJ:.4g}",
        f"{m.energy.mode}, first conv {m.energy.first_conv}",
    ]
    if twin := m.compare(m.energy):
        header.append("ANN (mJ)")
        numbers.append(f"{twin.energy_mJ:.4g}")
    return (
        f"<h3>Markdown</h3><pre>{_E(tables.markdown(header, [numbers]))}</pre>"
        f"<h3>LaTeX</h3><pre>{_E(tables.latex(header, [numbers]))}</pre>"
    )


def _provenance(report: Report) -> list[list[str]]:
    facts = report.facts
    checkpoint = facts["checkpoint"]
    found = [
        ["checkpoint", f"{checkpoint['path']} (SHA-256 {checkpoint['sha256'][:16]}...)"],
        ["weights", "moving average" if facts["config"]["use_ema"] else "as trained"],
        ["git commit", facts["git_commit"]],
    ]
    return found + [[name, version] for name, version in facts["versions"].items()]
