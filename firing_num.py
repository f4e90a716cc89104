"""How accurate a checkpoint is, how often its neurons fire, how many operations that takes, and how much energy.

`python firing_num.py --resume output/train/demo/model_best.pth.tar`
`python firing_num.py --from-rates data/paper/table_s1_8_512.json`  (published rates; no checkpoint, no data)
`python firing_num.py --compare output/train/a output/train/b`  (each with the settings it was trained with)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.parse import parse_config
from utils.errors import UserError, run_script

if TYPE_CHECKING:
    from utils.config.settings import Config
    from utils.run.distributed import Process

DEFAULT_OUTPUT = "output/firing"


def main(argv: list[str]) -> int:
    cfg = parse_config(
        argv,
        prog="firing_num.py",
        description="Evaluate a checkpoint: accuracy, firing rates, operations, energy.",
        option_means={"batch_size": "val_batch_size"},  # there is no other batch here
        inside=_settings_inside,
    )
    if not (cfg.resume or cfg.from_rates or cfg.compare):
        raise UserError(
            "resume: no checkpoint given, and untrained weights would be measured; add --resume FILE "
            "(or --compare FILES for several, or --from-rates FILE for the energy of published rates)"
        )
    # After parsing, so that --help and a wrong setting are answered at once: torch takes seconds to import.
    from utils.run.console import logger, setup_logging
    from utils.run.distributed import distributed
    from utils.run.folder import lock_folder, refuse_inside

    work = from_rates if cfg.from_rates else compare if cfg.compare else measure
    with distributed(cfg) as process:
        setup_logging(process)
        if cfg.inside:
            logger.info(f"settings: those inside {cfg.inside}, without its paths, device and workers")
        for warning in cfg.warnings:
            logger.warning(f"warning: {warning}")
        folder = output_folder(cfg)
        for key, path in files_read(cfg):
            refuse_inside(folder, key, path)
        if not process.is_main:
            return work(cfg, process, folder)
        with lock_folder(folder, keep=False):
            return work(cfg, process, folder)


def _settings_inside(path: str) -> Mapping[Any, Any] | None:
    from utils.run.checkpoint import settings_inside  # only now: torch takes seconds to import

    return settings_inside(path)


def output_folder(cfg: Config) -> Path:
    """<output>/<experiment>; without an experiment, a name by what is measured."""
    name = "comparison" if cfg.compare else Path(cfg.from_rates).stem or Path(cfg.resume).resolve().parent.name
    return Path(cfg.output or DEFAULT_OUTPUT) / (cfg.experiment or name)


def files_read(cfg: Config) -> list[tuple[str, str]]:
    """Setting and path of each file that is read after the folder of an earlier run is moved."""
    found = [("resume", cfg.resume), ("from_rates", cfg.from_rates), ("hardware", cfg.hardware)]
    for key in ("compare", "attention_map", "plugin"):
        found += [(key, path) for path in getattr(cfg, key) or ()]
    return [(key, path) for key, path in found if path]


def measure(cfg: Config, process: Process, folder: Path) -> int:
    """Measure the checkpoint, all processes together; the main one writes the report."""
    import model  # noqa: F401 -- registers the models
    from utils.measure.measurement import Measurement
    from utils.measure.sweep import sweep, why_no_sweep
    from utils.measure.verify import verify_spike_driven
    from utils.report.attention_picture import attention_picture
    from utils.report.files import facts_of, show, write_report
    from utils.report.report import Report
    from utils.run.build import rows
    from utils.run.plugins import import_plugins, say_what_changed

    import_plugins(cfg.plugin)
    measurement = Measurement(cfg, process)
    say_what_changed(measurement.checkpoint, cfg.resume)
    # What may fail comes first: a wrong file name should not cost an evaluation.
    maps = attention_picture(measurement, cfg.attention_map) if cfg.attention_map else []
    steps = cfg.sweep_T or []
    if reason := why_no_sweep(measurement, steps):
        measurement.notes.append(f"left out: sweep_T, since {reason}")
        steps = []
    proof = None
    if cfg.verify:
        images, _ = measurement.first_batch(cfg.verify_samples)
        proof = verify_spike_driven(measurement.model, images)
    measured = measurement.evaluate()
    points = sweep(measurement, steps) if steps else []
    if not process.is_main:
        return 0
    title, facts = f"{cfg.model} on {cfg.dataset}", facts_of(measurement)
    report = Report(title, measured, facts, verification=proof, sweep=points, attention_maps=maps)
    report.parts = rows(measurement.model)
    show(report)
    write_report(report, folder)
    return 0 if proof is None or proof.passed else 1


def compare(cfg: Config, process: Process, folder: Path) -> int:
    """Measure several checkpoints, all processes together; the main one writes the comparison."""
    import model  # noqa: F401 -- registers the models
    from utils.measure.compared import compare as measure_all
    from utils.report.comparison import Comparison
    from utils.report.files import show, write_comparison

    rows = measure_all(cfg, process)
    if process.is_main:
        report = Comparison(rows)
        show(report)
        write_comparison(report, folder)
    return 0


def from_rates(cfg: Config, process: Process, folder: Path) -> int:
    """Energy of published rates in every reading of the published formula; the main process alone computes it."""
    from utils.measure.measurement import chosen_hardware
    from utils.report.files import show, write_rates_report
    from utils.report.rates import RatesReport

    if process.is_main:
        report = RatesReport(cfg.from_rates, chosen_hardware(cfg).cost)
        show(report)
        write_rates_report(report, folder)
    return 0


if __name__ == "__main__":
    run_script(main)
