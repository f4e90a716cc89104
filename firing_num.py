"""How accurate a checkpoint is, how often its neurons fire, how many operations that takes, and how much energy.

`python firing_num.py -c conf/digits/1_64_15E_t4.yml --resume output/train/demo/model_best.pth.tar`
`python firing_num.py --from-rates data/paper/table_s1_8_512.json`  (published rates; no checkpoint, no data)
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

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
    )
    if cfg.from_rates:
        return from_rates(cfg)
    if not cfg.resume:
        raise UserError(
            "resume: no checkpoint given, and untrained weights would be measured; add --resume FILE "
            "(or --from-rates FILE for the energy of published rates)"
        )
    # After parsing, so that --help and a wrong setting are answered at once: torch takes seconds to import.
    from utils.run.console import logger, setup_logging
    from utils.run.distributed import distributed

    with distributed(cfg) as process:
        setup_logging(process)
        for warning in cfg.warnings:
            logger.warning(f"warning: {warning}")
        return measure(cfg, process)


def measure(cfg: Config, process: Process) -> int:
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
    folder = output_folder(cfg, Path(cfg.resume).resolve().parent.name)
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


def from_rates(cfg: Config) -> int:
    """Energy of published rates in every reading of the published formula."""
    from utils.measure.measurement import chosen_hardware
    from utils.report.files import print_sections, write_rates_report
    from utils.report.rates import RatesReport

    report = RatesReport(cfg.from_rates, chosen_hardware(cfg).cost)
    print_sections(report.sections())
    folder = output_folder(cfg, Path(cfg.from_rates).stem)
    print(f"written: {write_rates_report(report, folder)}")
    return 0


def output_folder(cfg: Config, name: str) -> Path:
    """<output>/<experiment>, made if it does not exist."""
    folder = Path(cfg.output or DEFAULT_OUTPUT) / (cfg.experiment or name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Found out now, and not after the evaluation.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written: {error.strerror}; choose another --output"
        ) from error
    return folder


if __name__ == "__main__":
    run_script(main)
