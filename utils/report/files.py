"""The files that firing_num.py writes: report.json, layers.csv, firing.csv, report.html and the pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.measure import firing
from utils.measure.measurement import Measurement, checkpoint_facts
from utils.report.figures import draw_energy, draw_firing_rates, draw_sweep
from utils.report.models import model_picture
from utils.report.page import write_page
from utils.report.rates import RatesReport
from utils.report.report import Report, write_layers_csv
from utils.run.console import logger
from utils.run.reproduce import git_commit, versions


def facts_of(measurement: Measurement) -> dict[str, Any]:
    """What the numbers belong to: checkpoint, settings, versions, commit."""
    cfg = measurement.cfg
    return {
        "checkpoint": checkpoint_facts(cfg.resume, measurement.checkpoint),
        "command": " ".join(sys.argv),
        "config": cfg.as_dict(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def print_sections(sections: Sequence[tuple[str, str]], write: Callable[[str], None] = print) -> None:
    """Each section under its title."""
    for title, text in sections:
        write(f"\n{title}\n{'=' * len(title)}\n{text}")


def show(report: Report) -> None:
    """Print the report to the terminal."""
    print_sections(report.sections(), logger.info)


def write_report(report: Report, folder: Path) -> None:
    """Write all files and say where."""
    m = report.measured
    title = f"{report.title}: {m.accuracy.top1:.2f}% top-1"
    written = ["report.html", "report.json", "layers.csv", "firing.csv"]
    if m.firing:
        draw_firing_rates(m.firing, folder / "firing.png", title)
        written.append("firing.png")
    if m.energy.rows:
        draw_energy(m.energy, folder / "energy.png", title)
        written.append("energy.png")
    if report.sweep:
        draw_sweep(report.sweep, folder / "sweep.png", report.title)
        written.append("sweep.png")
    ratios = model_picture(m.models, report.title)
    firing.write_csv(folder / "firing.csv", m.firing)
    write_layers_csv(folder / "layers.csv", m.energy)
    report.write_json(folder / "report.json")
    for picture in [*report.attention_maps, *([ratios] if ratios else [])]:
        picture.write(folder)
        written.append(picture.name)
    sizes = f"{m.family.shape.description}, " if m.family else ""
    subtitle = f"{sizes}T = {m.counts.time_steps}"
    write_page(
        folder / "report.html", "report.html", title=report.title, subtitle=subtitle, report=report, ratios=ratios
    )
    logger.info(f"\nwritten: {folder}/{{{', '.join(written)}}}")


def write_rates_report(report: RatesReport, folder: Path) -> str:
    """Write report.html, report.json and layers.csv of a file of rates; returns where."""
    (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    write_layers_csv(folder / "layers.csv", report.chosen)
    title, subtitle = report.file.title, report.file.source
    write_page(folder / "report.html", "rates.html", title=title, subtitle=subtitle, report=report)
    return f"{folder}/{{report.html, report.json, layers.csv}}"
