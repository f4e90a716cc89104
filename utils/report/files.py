"""What firing_num.py leaves behind: report.json, layers.csv, firing.csv, report.html and the pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.errors import UserError
from utils.measure import firing
from utils.measure.attention_map import attention_maps, draw_attention_maps, read_images, to_pictures
from utils.measure.measurement import Measurement, checkpoint_facts
from utils.measure.sdt.rates_file import RatesReport
from utils.report.figures import draw_energy, draw_firing_rates, draw_sweep
from utils.report.page import write_html
from utils.report.report import Report, write_layers_csv
from utils.run.console import logger
from utils.run.reproduce import git_commit, versions

_MOST_MAPS = 64  # rows of one picture; more would be unreadable, and slow to draw


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
    """Write all files and say where.

    Raises:
        UserError: a file cannot be written.
    """
    m = report.measured
    title = f"{report.title}: {m.accuracy.top1:.2f}% top-1"
    written = ["report.html", "report.json", "layers.csv", "firing.csv", "firing.png", "energy.png"]
    try:
        draw_firing_rates(m.firing, folder / "firing.png", title)
        draw_energy(m.energy, folder / "energy.png", title)
        if report.sweep:
            draw_sweep(report.sweep, folder / "sweep.png", report.title)
            written.append("sweep.png")
        firing.write_csv(folder / "firing.csv", m.firing)
        write_layers_csv(folder / "layers.csv", m.energy)
        report.write_json(folder / "report.json")
        write_html(folder / "report.html", report)
    except OSError as error:
        raise UserError(f"output folder {folder}: {error}; choose another --output") from error
    logger.info(f"\nwritten: {folder}/{{{', '.join(written + report.attention_maps)}}}")


def write_rates_report(report: RatesReport, folder: Path) -> str:
    """Write report.json and layers.csv of a file of rates; returns where.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        write_layers_csv(folder / "layers.csv", report.chosen)
    except OSError as error:
        raise UserError(f"output folder {folder}: {error}; choose another --output") from error
    return f"{folder}/{{report.json, layers.csv}}"


@dataclass(frozen=True)
class MapInput:
    """What attention maps are drawn of."""

    x: Tensor
    labels: list[str]


def map_input(measurement: Measurement, asked: list[str]) -> MapInput:
    """The first samples of the evaluation, or image files.

    Raises:
        UserError: neither a number nor image files.
    """
    if len(asked) == 1 and asked[0].lstrip("+-").isdigit():
        samples = int(asked[0])
        if not 1 <= samples <= _MOST_MAPS:
            raise UserError(f"attention_map: {samples} samples; give 1 to {_MOST_MAPS}, or image files")
        x, classes = measurement.first_batch(samples)
        return MapInput(x, [f"class {int(label)}" for label in classes])
    x = read_images(asked, measurement.data, measurement.process.device)
    return MapInput(x, [Path(path).name for path in asked])


def attach_attention_maps(report: Report, measurement: Measurement, shown: MapInput, folder: Path) -> None:
    """Draw the maps into the folder and name the file in the report."""
    maps = attention_maps(measurement.model, shown.x)
    draw_attention_maps(to_pictures(shown.x, measurement.data), maps, folder / "attention.png", shown.labels)
    report.attention_maps = ["attention.png"]
