"""report.html: one page in one file, without scripts or network, pictures inside; light or dark as the browser asks.

Charts are HTML boxes with sizes in percent, so that they fit any width and stay text.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from utils.measure.energy import PJ_PER_MJ, EnergyReport
from utils.measure.firing import FiringRow
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
    if compared := m.compare(m.energy):
        twin, _ = compared
        tiles.append((tables.ratio(twin.ratio), f"energy of the ANN twin ({tables.energy(twin.energy_pJ)})"))
    parts = [
        f"<header><h1>{_E(report.title)}</h1><p>{_E(_subtitle(report))}</p></header>",
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{_E(value)}</b><span>{_E(text)}</span></div>' for value, text in tiles)
        + "</div>",
        _section("What it costs", _totals(report)),
    ]
    if m.energy.rows:
        table = _details("All numbers", _table(*layer_cells(m.energy)))
        parts.append(_section("Energy by layer", _energy_chart(m.energy) + table))
    if m.firing:
        table = _details("All numbers", _table(*rate_cells(m.firing)))
        parts.append(_section("What fires", _rate_chart(m.firing) + table))
    if report.attention_maps:
        parts.append(_section("Where attention looks", _maps(report, path.parent)))
    if report.sweep:
        parts.append(_section("Time steps", _table(*sweep_cells(report.sweep))))
    if report.verification is not None:
        good = "Spike-driven" if report.verification.passed else "NOT spike-driven"
        lines = "<br>".join(_E(line) for line in report.verification.lines())
        text = f"<p><b>{good}</b>, on {report.verification.samples} samples:</p><p>{lines}</p>"
        parts.append(_section("Proof", text))
    if report.parts:
        parts.append(_section("How each part ran", _table(*part_cells(report.parts))))
    if m.notes:
        parts.append(_section("Notes", "".join(f"<p>{_E(note)}</p>" for note in m.notes)))
    parts.append(_section("To copy", _to_copy(report)))
    parts.append(_section("This run", _table(["", ""], _provenance(report))))
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
    return f"{m.family.description + ', ' if m.family else ''}T = {m.counts.time_steps}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_E(title)}</h2>{content}</section>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_E(title)}</summary>{content}</details>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_E(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_E(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    shown = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="scroll"><table>{shown}<tbody>{body}</tbody></table></div>'


def _totals(report: Report) -> str:
    m = report.measured
    modes = "exact: operations really needed. formula: MACs x rate of what enters."
    notes = [f"Per sample. Costs: {m.energy.cost}. Compute only, not measured power.", modes]
    if m.family and (compared := m.compare(m.energy)):
        notes[1] += f" {m.family.paper_mode}"
        formula = compared[0].formula
        notes.append(f"ANN twin: the same layers with real values, one pass, attention counted as {formula}.")
    notes += m.energy.notes
    if m.energy.other_first_conv_mJ is not None:
        other = tables.energy(m.energy.other_first_conv_mJ * PJ_PER_MJ)
        notes.insert(1, f"With first conv {m.energy.other_first_conv}: {other}.")
    notes += [f"Not in the total: {r.name} {tables.energy(r.energy_pJ)} ({r.charged})." for r in m.energy.extras]
    return _table(*total_cells(m)) + "".join(f'<p class="note">{_E(note)}</p>' for note in notes)


def _energy_chart(report: EnergyReport) -> str:
    top = max(row.energy_pJ for row in report.rows) or 1.0
    total = report.total_pJ or 1.0
    lines = []
    for row in report.rows:
        tip = f"{row.name}: {tables.count(row.operations)} {row.kind}, {row.charged}"
        lines.append(
            f'<div class="row" title="{_E(tip)}"><span class="name">{_label(row.name, row.paper_name)}</span>'
            f'<span class="track"><i class="bar {row.kind.lower()}" style="width:{100 * row.energy_pJ / top:.2f}%"></i>'
            f'</span><span class="value">{_E(tables.energy(row.energy_pJ))} <em>{row.energy_pJ / total:.1%}</em></span>'
            "</div>"
        )
    legend = '<p class="legend"><i class="key ac"></i>additions (AC) <i class="key mac"></i>multiply and add (MAC)</p>'
    return legend + f'<div class="chart">{"".join(lines)}</div>'


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
        lines.append(
            f'<div class="row" title="{_E(tip)}"><span class="name">{_label(row.name, row.paper_name)}</span>'
            f'<span class="track"><i class="bar mean" style="width:{100 * row.mean_rate / top:.2f}%"></i>{dots}</span>'
            f'<span class="value">{row.mean_rate:.4f}</span></div>'
        )
    shown = [0, steps - 1] if steps > 8 else list(range(steps))
    keys = " ".join(f'<i class="key round" style="background:{_step_colour(t, steps)}"></i>t = {t + 1}' for t in shown)
    legend = f'<p class="legend"><i class="key mean"></i>mean over time {keys}; full width is {top:.3f}</p>'
    return legend + f'<div class="chart">{"".join(lines)}</div>'


def _step_colour(t: int, steps: int) -> str:
    share = 100 * t / max(1, steps - 1)
    return f"color-mix(in oklab, var(--late) {share:.0f}%, var(--early))"


def _label(name: str, paper: str) -> str:
    return f"{_E(paper)} <small>{_E(name)}</small>" if paper else _E(name)


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


def _to_copy(report: Report) -> str:
    m = report.measured
    header = ["model", "T", "top-1 (%)", "mean firing rate", "energy (mJ)", "accounting"]
    numbers = [
        m.family.title if m.family else report.facts["config"]["model"],
        str(m.counts.time_steps),
        f"{m.accuracy.top1:.2f}",
        tables.rate(m.mean_firing_rate, 4),
        f"{m.energy.total_mJ:.4g}",
        f"{m.energy.mode}, first conv {m.energy.first_conv}",
    ]
    if compared := m.compare(m.energy):
        header.append("ANN (mJ)")
        numbers.append(f"{compared[0].energy_mJ:.4g}")
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
