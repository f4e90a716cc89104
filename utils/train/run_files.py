"""What a training run leaves behind: its folder, log, resolved config, summary.csv and TensorBoard files."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import itertools
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.config.parse import to_yaml
from utils.errors import UserError
from utils.run.distributed import Process

if TYPE_CHECKING:
    from utils.config.settings import Config

logger = logging.getLogger("sdt")

DEFAULT_OUTPUT = "output/train"
SUMMARY = "summary.csv"
SUMMARY_LINES = "summary.jsonl"
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
    if cfg.resume == "auto" and not cfg.experiment:
        raise UserError("resume: auto looks in the run's folder; name it with --experiment")
    goes_on = cfg.resume not in ("", "auto") and not cfg.no_resume_opt
    if goes_on and not (cfg.experiment or cfg.output):
        return Path(cfg.resume).parent
    name = cfg.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{cfg.model}-{cfg.dataset.replace('/', '_')}"
    folder = Path(cfg.output or DEFAULT_OUTPUT) / name
    for key, path in (("initial_checkpoint", cfg.initial_checkpoint), ("resume", cfg.resume)):
        is_read = path not in ("", "auto") and not resumes_in_place(cfg, folder)
        if is_read and folder.resolve() in Path(path).resolve().parents:
            raise UserError(f"{key}: {path} lies in {folder}, where the new run begins; choose another --experiment")
    return folder


def resumes_in_place(cfg: Config, folder: Path) -> bool:
    """Whether the run goes on in its folder, instead of beginning in an empty one."""
    if cfg.resume == "auto":
        return True
    return bool(cfg.resume) and not cfg.no_resume_opt and Path(cfg.resume).parent.resolve() == folder.resolve()


@contextlib.contextmanager
def claimed(folder: Path, keep: bool) -> Iterator[None]:
    """Hold `folder` for this run. Unless it is to `keep` what lies there, an earlier run of that name is renamed.

    A start that fails before it has written a file leaves the folder as it found it.

    Raises:
        UserError: another live run writes to it, or it cannot be written.
    """
    aside = None
    if not keep and _holds_files(folder):
        with _locked(folder):
            aside = _free_name(folder)
            folder.rename(aside)
        logger.info(f"{folder} holds an earlier run: it is now {aside}")
    is_new = not folder.exists()
    with _locked(folder):
        try:
            yield
        finally:
            if is_new and not _holds_files(folder):
                with contextlib.suppress(OSError):  # a second error would hide the first
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
        cfg: written to args.yaml, and into the TensorBoard files.
        start_epoch: rows of the summaries from this epoch on belong to work that is done again, and are dropped.

    Raises:
        UserError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, cfg: Config, start_epoch: int) -> None:
        self.folder = folder
        self._wandb = _start_wandb(cfg, folder) if cfg.log_wandb else None  # first: the package may be missing
        self._handler = logging.FileHandler(folder / LOG)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(self._handler)
        config_text = to_yaml(cfg)
        (folder / ARGS).write_text(config_text)
        _keep_rows_before(folder / SUMMARY, start_epoch, lambda line: line.split(",")[0])
        _keep_rows_before(folder / SUMMARY_LINES, start_epoch, lambda line: json.loads(line)["epoch"])
        self.tensorboard = SummaryWriter(str(folder), purge_step=start_epoch)
        self.tensorboard.add_text("config", f"```yaml\n{config_text}\n```", start_epoch)

    def epoch(self, row: dict[str, Any], extras: dict[str, float]) -> None:
        """Append one epoch to the summaries and the TensorBoard files; `row` starts with the epoch.

        `extras` (speeds, firing rates) are not in the summaries, nor are times: a run that was interrupted and
        resumed has the same summaries as one that was not.
        """
        path = self.folder / SUMMARY
        new = not path.exists() or not path.stat().st_size
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(row)
            writer.writerow(_FLOAT_FORMAT.format(v) if isinstance(v, float) else v for v in row.values())
        with (self.folder / SUMMARY_LINES).open("a") as file:
            file.write(json.dumps(row) + "\n")
        scalars = {name.replace("_", "/", 1): value for name, value in row.items() if name != "epoch"} | extras
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, row["epoch"])
        self.tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["epoch"])

    def picture(self, name: str, file: Path) -> None:
        """Show a picture of the run's folder in TensorBoard."""
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))  # [H, W, 3]
        self.tensorboard.add_image(name, pixels, dataformats="HWC")

    def close(self) -> None:
        self.tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        logger.removeHandler(self._handler)
        self._handler.close()


def _start_wandb(cfg: Config, folder: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"log_wandb: the package wandb cannot be imported ({error}); pip install wandb") from error
    return wandb.init(project="spike-driven-transformer", name=folder.name, dir=str(folder), config=cfg.as_dict())


def _keep_rows_before(path: Path, epoch: int, epoch_of: Callable[[str], Any]) -> None:
    """Drop the lines of a summary from `epoch` on, and a last line that a killed process left torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            known = int(epoch_of(line)) < epoch
        except ValueError:
            known = line.startswith("epoch,") and epoch > 0  # the header
        if known and line.endswith("\n"):
            kept.append(line)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def clock(seconds: float) -> str:
    """A duration as people read it: 0:00:12."""
    return str(timedelta(seconds=round(seconds)))


def peak_memory(device: torch.device) -> str:
    """The most memory this process has held so far, on the GPU or, without one, in all."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{held / 2**30:.1f} GiB"


class Progress:
    """Shows how far an epoch is: one live line in a terminal, a log line now and then elsewhere.

    Args:
        title: what is shown first.
        steps: steps of the whole epoch.
        images_per_step: over all processes.
        interval: steps between two readings of the loss, and between two log lines.
        show: whether this process shows anything.
        done: steps done before.
    """

    def __init__(self, title: str, steps: int, images_per_step: int, interval: int, show: bool, done: int = 0) -> None:
        self._title = title
        self._steps = steps
        self._images = images_per_step
        self._interval = interval
        self._show = show
        self._before = done
        self._started = time.perf_counter()
        self._bar = (
            tqdm(total=steps, initial=done, desc=title, unit="step", leave=False, dynamic_ncols=True)
            if show and sys.stdout.isatty()
            else None
        )

    def step(self, done: int, loss: Callable[[], float] | None = None) -> None:
        """Called after each step; the loss is read from the device only when it is shown."""
        if not self._show:
            return
        due = done % self._interval == 0 or done == self._steps
        seconds = (time.perf_counter() - self._started) / (done - self._before)
        speed = self._images / seconds
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if due:
                self._bar.set_postfix_str(f"{f'loss {loss():.4f}, ' if loss else ''}{speed:.0f} images/s")
        elif due and done < self._steps:
            left = clock(seconds * (self._steps - done))
            shown = f"loss {loss():.4f}  " if loss else ""
            logger.info(f"{self._title}  step {done}/{self._steps}  {shown}{speed:.0f} images/s  {left} left")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
