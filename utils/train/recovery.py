"""Stopping a run so that it can be resumed, and resuming it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from utils.config.settings import Config
from utils.errors import NonFiniteError, Stopped, UserError
from utils.run.console import logger
from utils.run.distributed import Process
from utils.train.checkpoint_store import LAST, CheckpointStore
from utils.train.run_state import RunState
from utils.train.step import EpochSums

_WATCHED = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what clusters send before they end a job

_PATIENCE = 5  # seconds after the first signal, from which on Ctrl-C stops at once


class StopRequest:
    """Notes the first SIGINT or SIGTERM while entered, for the training loop to stop after its step.

    A second Ctrl-C interrupts at once, but only some seconds later: launchers and clusters send a signal several times,
    also to a process that is writing its checkpoint.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
            self._noted = time.monotonic()
            logger.info(f"{signal.Signals(number).name}: finishing the step (Ctrl-C after {_PATIENCE} s stops at once)")
        elif number == signal.SIGINT and time.monotonic() - self._noted > _PATIENCE:
            raise KeyboardInterrupt


class Recovery:
    """Loads the checkpoint that a run continues from, and writes those within an epoch.

    All processes of a run call its methods together.
    """

    def __init__(self, cfg: Config, process: Process, state: RunState, store: CheckpointStore) -> None:
        self.stop = StopRequest()
        self._cfg, self._process, self._state, self._store = cfg, process, state, store
        self._mark = (0, 0)  # the last multiple of `recovery_interval`: epoch, number

    def resume(self) -> tuple[int, EpochSums | None]:
        """Load the checkpoint; the epoch to continue with, and the sums of the steps done in it, if there are any.

        Raises:
            UserError: it cannot be read, does not fit, or is of another number of processes within an epoch.
        """
        cfg, store = self._cfg, self._store
        path = store.newest() if cfg.resume == "auto" else Path(cfg.resume)
        if path is None:
            logger.info(f"resume: no checkpoint in {store.folder} yet; starting from the beginning")
            return 0, None
        if cfg.no_resume_opt:
            self._state.restore_weights(path)
            logger.info(f"weights of {path}, without optimizer and epoch")
            return 0, None
        saved = self._state.restore(path, cfg)
        if os.path.realpath(path.parent) == os.path.realpath(store.folder):
            # In another folder, the history would name files that are not there.
            if cfg.resume != "auto":
                store.refuse_older(path, saved)
            store.resume(saved)
            if self._process.is_main:
                store.finish_saving(path, saved)
        epoch, progress = saved.epoch, saved.progress
        if progress is None:
            logger.info(f"resumed {path} after epoch {epoch + 1}")
            return epoch + 1, None
        processes = len(progress.loss_sums)
        if processes != self._process.world_size:
            raise UserError(
                f"checkpoint {path} was written in the middle of an epoch by {processes} process(es), and "
                f"{self._process.world_size} would divide the rest of the data differently; resume with {processes}, "
                f"or from {LAST}"
            )
        logger.info(f"resumed {path} in epoch {epoch + 1} after step {progress.steps}")
        rank = self._process.rank
        loss_sum, samples = progress.loss_sums[rank], int(progress.samples[rank])
        return epoch, EpochSums(self._process.device, progress.steps, loss_sum, samples)

    def between_steps(self, epoch: int, sums: EpochSums) -> None:
        """Write a recovery checkpoint if one is due, or if a signal was received.

        Raises:
            Stopped: a signal was received; the message says how to resume.
        """
        stop = self.must_stop()
        if stop or self._is_due(epoch, sums.steps):
            self.save(epoch, sums)
        if stop:
            raise self.stopped()

    def _is_due(self, epoch: int, steps: int) -> bool:
        """Whether a multiple of `recovery_interval` was passed since the last call (steps may come in groups)."""
        interval = self._cfg.recovery_interval
        mark = (epoch, steps // interval) if interval else self._mark
        due = mark > self._mark and mark[1] > 0
        self._mark = max(mark, self._mark)
        return due

    def must_stop(self) -> bool:
        """Whether any process received a signal; the answer is the same in all of them."""
        return self._process.any(self.stop.signal_number is not None)

    def stopped(self) -> Stopped:
        """The exception that ends a run which is to be resumed."""
        number = self.stop.signal_number or signal.SIGTERM  # another process received it
        return Stopped(f"stopped; continue with the same command and --resume {self._store.newest()}", number)

    def save(self, epoch: int, sums: EpochSums) -> None:
        """Write the recovery checkpoint of this place in the epoch."""
        progress = {
            "steps": sums.steps,
            "loss_sums": self._process.gather(float(sums.loss_sum)),
            "samples": self._process.gather(sums.samples),
        }
        if self._process.is_main:
            self._store.save_recovery(self._state.snapshot(self._cfg), epoch, progress)
        # A launcher that sees one process end kills the others, also the one that still writes.
        self._process.wait_for_all()

    @contextlib.contextmanager
    def kept(self, epoch: int) -> Iterator[None]:
        """Around what follows the last step of an epoch, all of which `save` has written: if it fails, say so."""
        try:
            yield
        except (Stopped, NonFiniteError):
            raise
        except Exception:
            logger.info(f"the steps of epoch {epoch + 1} are kept: continue with the same command and --resume auto")
            raise
