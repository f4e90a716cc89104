"""What a training run leaves behind: its folder, log, resolved config, summary.csv and TensorBoard files."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.distributed import Process
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.settings import Config

logger = logging.getLogger("sdt")

DEFAULT_OUTPUT = "output/train"
SUMMARY = "summary.csv"
ARGS = "args.yaml"
LOG = "log.txt"
LOCK = ".lock"

_FLOAT_FORMAT = "{:.10g}"


def setup_logging(process: Process) -> None:
    """Log to the terminal, from the main process only."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if process.is_main else logging.ERROR)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)


def run_folder(cfg: Config) -> Path:
    """Where the run writes: output/train/<experiment>; a resumed run goes on beside its checkpoint.

    Without an experiment name the folder is named by time, model and data set.
    """
    if cfg.resume and not (cfg.experiment or cfg.output):
        return Path(cfg.resume).parent
    name = cfg.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{cfg.model}-{cfg.dataset.replace('/', '_')}"
    return Path(cfg.output or DEFAULT_OUTPUT) / name


@contextlib.contextmanager
def claimed(folder: Path, resumes_in_place: bool) -> Iterator[None]:
    """Hold `folder` for this run. What an earlier run of that name left is renamed, never overwritten.

    Raises:
        UserError: another live run writes to it, or it cannot be written.
    """
    if not resumes_in_place and folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        with _locked(folder):
            aside = _free_name(folder)
            folder.rename(aside)
        logger.info(f"{folder} holds an earlier run: it is now {aside}")
    with _locked(folder):
        yield


def _free_name(folder: Path) -> Path:
    """<name>.1, .2, ...: the first that does not exist."""
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written: {error.strerror}; choose another --output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output folder {folder} is in use by another run; give this one another --experiment"
            ) from None
        except OSError as error:
            logger.warning("cannot lock %s (%s): do not start a second run there", folder, error.strerror)
        yield


class RunLog:
    """The files of one run, written by its main process.

    Args:
        folder: exists already.
        config_text: the resolved configuration, written to args.yaml.
        start_epoch: rows of summary.csv from this epoch on belong to work that is done again, and are dropped.
    """

    def __init__(self, folder: Path, config_text: str, start_epoch: int) -> None:
        self.folder = folder
        self._handler = logging.FileHandler(folder / LOG)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(self._handler)
        (folder / ARGS).write_text(config_text)
        _drop_rows_from(folder / SUMMARY, start_epoch)
        self.tensorboard = SummaryWriter(str(folder), purge_step=start_epoch or None)
        self.tensorboard.add_text("config", f"```yaml\n{config_text}\n```", start_epoch)

    def epoch(self, row: dict[str, Any]) -> None:
        """Append one epoch to summary.csv and to the TensorBoard files; `row` starts with the epoch.

        Times are not in it: a run that was interrupted and resumed has the same summary as one that was not.
        """
        path = self.folder / SUMMARY
        new = not path.exists() or not path.stat().st_size
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow(_FLOAT_FORMAT.format(v) if isinstance(v, float) else v for v in row.values())
        for name, value in row.items():
            if name != "epoch":
                self.tensorboard.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        self.tensorboard.flush()

    def close(self) -> None:
        self.tensorboard.close()
        logger.removeHandler(self._handler)
        self._handler.close()


def _drop_rows_from(path: Path, epoch: int) -> None:
    if not path.exists():
        return
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if row and int(row[0]) < epoch]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept] if header else [])


def clock(seconds: float) -> str:
    """A duration as people read it: 0:00:12."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Shows how far an epoch is: one live line in a terminal, a log line now and then elsewhere."""

    def __init__(self, title: str, steps: int, images_per_step: int, interval: int, show: bool) -> None:
        self._title = title
        self._steps = steps
        self._images = images_per_step
        self._interval = interval
        self._show = show
        self._started = time.perf_counter()
        self._bar = (
            tqdm(total=steps, desc=title, unit="step", leave=False, dynamic_ncols=True)
            if show and sys.stdout.isatty()
            else None
        )

    def step(self, done: int, loss: Callable[[], float] | None = None) -> None:
        """Called after each step; the loss is read from the device only when a line is written."""
        if not self._show:
            return
        due = done % self._interval == 0 or done == self._steps
        seconds = time.perf_counter() - self._started
        speed = done * self._images / seconds
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if due:
                self._bar.set_postfix_str(f"{f'loss {loss():.4f}, ' if loss else ''}{speed:.0f} images/s")
        elif due and done < self._steps:
            left = clock(seconds / done * (self._steps - done))
            shown = f"loss {loss():.4f}  " if loss else ""
            logger.info(f"{self._title}  step {done}/{self._steps}  {shown}{speed:.0f} images/s  {left} left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
