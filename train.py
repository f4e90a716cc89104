"""Train a Spike-driven Transformer: `python train.py -c conf/digits/1_64_15E_t4.yml`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from utils.config.parse import parse_config
from utils.errors import run_script

if TYPE_CHECKING:
    from utils.config.settings import Config
    from utils.run.distributed import Process


def main(argv: list[str]) -> int:
    cfg = parse_config(argv, prog="train.py", description="Train a Spike-driven Transformer.")
    # After parsing, so that --help and a wrong setting are answered at once: torch takes seconds to import.
    from utils.run.console import setup_logging
    from utils.run.distributed import distributed
    from utils.run.folder import lock_folder
    from utils.train.run_folder import resumes_in_place, run_folder

    with distributed(cfg) as process:
        setup_logging(process)
        register_names(cfg)
        if cfg.dry_run:
            return dry_run(cfg, process)
        folder = run_folder(cfg)
        if not process.is_main:
            return train(cfg, process, folder)
        with lock_folder(folder, keep=resumes_in_place(cfg, folder)):
            return train(cfg, process, folder)


def register_names(cfg: Config) -> None:
    """Register the models of this repository, then what the plugins define."""
    import model  # noqa: F401 -- registers the models
    from utils.run.plugins import import_plugins

    import_plugins(cfg.plugin)


def train(cfg: Config, process: Process, folder: Path) -> int:
    from utils.train.trainer import Trainer

    trainer = Trainer(cfg, process, folder)
    trainer.describe()
    with trainer.files():
        for epoch in trainer.epochs_left():
            trained = trainer.train(epoch)
            evaluated = trainer.evaluate(epoch)
            trainer.finish(epoch, trained, evaluated)
    trainer.conclude()
    return 0


def dry_run(cfg: Config, process: Process) -> int:
    from utils.train.dry_run import estimate
    from utils.train.trainer import Trainer

    trainer = Trainer(cfg, process, Path())
    trainer.describe()
    estimate(trainer)
    return 0


if __name__ == "__main__":
    run_script(main)
