"""The folder of a training run: its name, and whether the run goes on there."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from utils.config.settings import Config
from utils.errors import UserError
from utils.run.folder import refuse_inside

DEFAULT_OUTPUT = "output/train"


def run_folder(cfg: Config) -> Path:
    """Where the run writes: output/train/<experiment>; a resumed run writes beside its checkpoint.

    Without an experiment name the folder is named by time, model and data set.

    Raises:
        UserError: the settings name no folder to resume in, or a new run would replace the checkpoint it starts from.
    """
    if cfg.resume == "auto" and not cfg.experiment:
        raise UserError("resume: auto looks in the run's folder; name it with --experiment")
    goes_on = cfg.resume not in ("", "auto") and not cfg.no_resume_opt
    if goes_on and not (cfg.experiment or cfg.output):
        return Path(cfg.resume).parent
    name = cfg.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{cfg.model}-{cfg.dataset.replace('/', '_')}"
    folder = Path(cfg.output or DEFAULT_OUTPUT) / name
    for key in ("initial_checkpoint", "initial_partial", "resume"):
        path = getattr(cfg, key)
        is_read = path not in ("", "auto") and not resumes_in_place(cfg, folder)
        if is_read:
            refuse_inside(folder, key, path)
    return folder


def resumes_in_place(cfg: Config, folder: Path) -> bool:
    """Whether the run continues in its folder, instead of starting in an empty one."""
    if cfg.resume == "auto":
        return True
    return (
        bool(cfg.resume)
        and not cfg.no_resume_opt
        and os.path.realpath(Path(cfg.resume).parent) == os.path.realpath(folder)
    )
