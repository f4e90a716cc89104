"""The folder that a script writes into: locked for one run, and what an earlier one wrote there is kept aside."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.files import UNFINISHED
from utils.run.console import logger

LOCK = ".lock"


def refuse_inside(folder: Path, key: str, path: str) -> None:
    """Refuse a file, named by the setting `key`, that lies in `folder`: it would be moved before it is read.

    Raises:
        UserError: it lies there.
    """
    if Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents:
        raise UserError(f"{key}: {path} lies in {folder}, where the new run begins; choose another --experiment")


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
