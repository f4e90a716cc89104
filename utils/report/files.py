"""The files that firing_num.py writes: report.json, layers.csv, firing.csv, report.html and the pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from utils.measure import firing
from utils.measure.measurement import Measurement, checkpoint_facts
from utils.report.comparison import Comparison
from utils.report.figures import draw_comparison, draw_energy, draw_firing_rates, draw_sweep
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
        "network": measurement.family.shape.title if measurement.family else cfg.model,
        "parameters": measurement.parameters,
        "checkpoint": checkpoint_facts(cfg.resume, measurement.checkpoint),
        "config": cfg.as_dict(),
        **_run_facts(),
    }


def _run_facts() -> dict[str, Any]:
    return {"command": " ".join(sys.argv), "versions": versions(), "git_commit": git_commit()}


def show(report: Report | RatesReport | Comparison) -> None:
    """Print each section of the report under its title."""
    for title, text in report.sections():
        logger.info(f"\n{title}\n{'=' * len(title)}\n{text}")


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
    report.ratios = model_picture(m.models, report.title)
    firing.write_csv(folder / "firing.csv", m.firing)
    write_layers_csv(folder / "layers.csv", m.energy)
    report.write_json(folder / "report.json")
    for picture in [*report.attention_maps, *([report.ratios] if report.ratios else [])]:
        picture.write(folder)
        written.append(picture.name)
    sizes = f"{m.family.shape.description}, " if m.family else ""
    subtitle = f"{sizes}T = {m.counts.time_steps}"
    write_page(folder / "report.html", "report.html", title=report.title, subtitle=subtitle, report=report)
    logger.info(f"\nwritten: {folder}/{{{', '.join(written)}}}")


def write_rates_report(report: RatesReport, folder: Path) -> None:
    """Write report.html, report.json and layers.csv of a file of rates, and say where."""
    (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    write_layers_csv(folder / "layers.csv", report.chosen)
    title, subtitle = report.file.title, report.file.source
    write_page(folder / "report.html", "rates.html", title=title, subtitle=subtitle, report=report)
    logger.info(f"\nwritten: {folder}/{{report.html, report.json, layers.csv}}")


def write_comparison(report: Comparison, folder: Path) -> None:
    """Write comparison.html, comparison.json, comparison.csv and comparison.png, and say where."""
    picture = draw_comparison(report.rows)
    picture.write(folder)
    report.write_csv(folder / "comparison.csv")
    content = report.as_dict() | _run_facts()
    (folder / "comparison.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    title, subtitle = report.title, report.subtitle
    write_page(
        folder / "comparison.html", "comparison.html", title=title, subtitle=subtitle, report=report, picture=picture
    )
    logger.info(f"\nwritten: {folder}/comparison.{{html, json, csv, png}}")
