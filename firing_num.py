"""Load a checkpoint, evaluate it, and count what it fires.

`python firing_num.py -c conf/digits/1_64_15E_t4.yml --resume output/train/demo/model_best.pth.tar`
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import parse_config
from utils.errors import UserError, run_script

if TYPE_CHECKING:
    from utils.distributed import Process
    from utils.engine import EvalResult
    from utils.firing import FiringRow
    from utils.settings import Config

DEFAULT_OUTPUT = "output/firing"


def main(argv: list[str]) -> int:
    cfg = parse_config(
        argv,
        prog="firing_num.py",
        description="Evaluate a checkpoint and count the spikes of every tensor at every time step.",
        option_means={"batch_size": "val_batch_size"},  # there is no other batch here
    )
    if not cfg.resume:
        raise UserError("resume: no checkpoint given, and untrained weights would be measured; add --resume FILE")
    # After parsing, so that --help and a wrong setting are answered at once: torch takes seconds to import.
    from utils.distributed import distributed
    from utils.runlog import setup_logging

    with distributed(cfg) as process:
        setup_logging(process)
        accuracy, rows = measure(cfg, process)
        if process.is_main:
            report(cfg, process, accuracy, rows)
    return 0


def measure(cfg: Config, process: Process) -> tuple[EvalResult, list[FiringRow]]:
    """Accuracy and firing rates of the checkpoint over the evaluation split, all processes together."""
    import torch

    from model import SpikeDrivenTransformer
    from utils.build import build_model
    from utils.checkpoint import load_weights
    from utils.engine import evaluate
    from utils.firing import FiringRecorder
    from utils.loaders import build_eval_loader
    from utils.precision import Precision
    from utils.runlog import Progress, logger

    for warning in cfg.warnings:
        logger.warning(f"warning: {warning}")
    model = build_model(cfg)
    assert isinstance(model, SpikeDrivenTransformer)
    load_weights(model, cfg.resume, use_ema=cfg.use_ema)
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model.to(process.device).to(memory_format=memory_format)
    loader = build_eval_loader(cfg, device=process.device, rank=process.rank, world_size=process.world_size)
    images = cfg.val_batch_size * process.world_size
    precision = Precision(cfg, process.device)
    with (
        Progress("evaluating", len(loader), images, cfg.log_interval, process.is_main) as progress,
        FiringRecorder(model.spike_sources()) as recorder,
    ):
        accuracy = evaluate(model, loader, precision, process, memory_format=memory_format, on_step=progress.step)
    return accuracy, recorder.rows(process)


def report(cfg: Config, process: Process, accuracy: EvalResult, rows: list[FiringRow]) -> None:
    """Print the table; write it as JSON, CSV and a picture."""
    from utils.figures import draw_firing_rates
    from utils.firing import format_table, write_csv, write_json
    from utils.reproduce import git_commit, versions
    from utils.runlog import logger

    folder = Path(cfg.output or DEFAULT_OUTPUT) / (cfg.experiment or Path(cfg.resume).resolve().parent.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written: {error.strerror}; choose another --output"
        ) from error
    facts: dict[str, Any] = {
        "checkpoint": cfg.resume,
        "samples": accuracy.samples,
        "top1_percent": accuracy.top1,
        "top5_percent": accuracy.top5,
        "loss": accuracy.loss,
        "time_steps": len(rows[0].spikes),
        "config": cfg.as_dict(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(folder / "firing.json", rows, facts)
    write_csv(folder / "firing.csv", rows)
    draw_firing_rates(rows, folder / "firing.png", title=f"{cfg.model} on {cfg.dataset}: {accuracy.top1:.2f}% top-1")
    logger.info(format_table(rows))
    logger.info(
        f"{accuracy.samples} samples: top-1 {accuracy.top1:.2f}%, top-5 {accuracy.top5:.2f}%, "
        f"loss {accuracy.loss:.4f}; {accuracy.images_per_second:.0f} images/s with counting"
    )
    logger.info(f"written: {folder}/firing.json, firing.csv, firing.png")


if __name__ == "__main__":
    run_script(main)
