"""The folder of one run: its name, and a lock against a second run in it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from utils.config.settings import Config
from utils.errors import UserError
from utils.files import UNFINISHED
from utils.run.console import logger

DEFAULT_OUTPUT = "output/train"
LOCK = ".lock"


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
        if is_read and Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents:
            raise UserError(f"{key}: {path} lies in {folder}, where the new run begins; choose another --experiment")
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


@contextlib.contextmanager
def lock_folder(folder: Path, keep: bool) -> Iterator[None]:
    """Make `folder`, and lock it for this run while it is entered.

    If the run fails before it has written a file, the folder is left as it was.

    Args:
        keep: the run continues with the files there; otherwise the folder of an earlier run is renamed first.

    Raises:
        UserError: another live run writes to it, or it cannot be written.
    """
    aside = None
    if folder.exists():
        with _lock(folder):
            for unfinished in folder.glob(f".*{UNFINISHED}"):  # of a run that was killed, since none is alive
                unfinished.unlink()
            if not keep and _holds_files(folder):
                aside = _free_name(folder)
                folder.rename(aside)
        if aside is not None:
            logger.info(f"{folder} holds an earlier run: it is now {aside}")
    is_new = not folder.exists()
    with _lock(folder):
        try:
            yield
        finally:
            if is_new and not _holds_files(folder):
                with contextlib.suppress(OSError):  # an error here would hide the first one
                    (folder / LOCK).unlink()
                    folder.rmdir()
                    if aside is not None:
                        aside.rename(folder)
                        logger.info(f"nothing was written: {aside} is {folder} again")


def _holds_files(folder: Path) -> bool:
    """Whether anything but a lock lies in `folder`."""
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


def _free_name(folder: Path) -> Path:
    """<name>.1, .2, ...: the first that does not exist."""
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written: {error.strerror}; choose another --output"
        ) from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output folder {folder} is in use by another run; give this one another --experiment"
            ) from None
        except (ImportError, OSError) as error:  # Windows has no fcntl
            logger.warning(f"warning: {folder} cannot be locked ({error}); do not start a second run there")
        yield
