"""Going on after an interruption, and stopping so that a run can go on."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from utils.errors import Stopped, UserError
from utils.run.console import logger
from utils.run.distributed import Process
from utils.train.checkpoint_store import LAST, CheckpointStore
from utils.train.run_state import RunState
from utils.train.step import Tally

if TYPE_CHECKING:
    from utils.config.settings import Config


_WATCHED = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what clusters send before they end a job

_PATIENCE = 5  # seconds


class StopRequest:
    """Notes the first SIGINT or SIGTERM while entered; a later Ctrl-C interrupts at once.

    Launchers and clusters repeat signals, to a process that is writing its checkpoint: only a second SIGINT, and
    only after a while, is a person's.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
    """Loads the checkpoint a run goes on from, and writes those within an epoch.

    All processes of a run call its methods together.
    """

    def __init__(self, cfg: Config, process: Process, state: RunState, store: CheckpointStore) -> None:
        self.stop = StopRequest()
        self._cfg = cfg
        self._process = process
        self._state = state
        self._store = store
        self._mark = (0, 0)

    def resume(self) -> tuple[int, Tally | None]:
        """Load the checkpoint; the epoch to go on with, and what was summed up in it already.

        Raises:
            UserError: it cannot be read, does not fit, or is of another number of processes within an epoch.
        """
        cfg, store = self._cfg, self._store
        path = store.newest() if cfg.resume == "auto" else Path(cfg.resume)
        if path is None:
            logger.info(f"resume: no checkpoint in {store.folder} yet, starting anew")
            return 0, None
        if cfg.no_resume_opt:
            self._state.restore_weights(path)
            logger.info(f"weights of {path}, without optimizer and epoch")
            return 0, None
        content = self._state.restore(path, cfg)
        if path.parent.resolve() == store.folder.resolve():
            # Elsewhere, the history would name files that are not there.
            if cfg.resume != "auto":
                store.refuse_branching(path, content)
            store.resume(content)
            if self._process.is_main:
                store.tidy(path, content)
        epoch, progress = int(content["epoch"]), content.get("progress")
        if progress is None:
            logger.info(f"resumed {path} after epoch {epoch + 1}")
            return epoch + 1, None
        processes = len(progress["loss_sums"])
        if processes != self._process.world_size:
            raise UserError(
                f"checkpoint {path} was written in the middle of an epoch by {processes} process(es), whose shares of "
                f"the data {self._process.world_size} cannot take over; resume with {processes}, or from {LAST}"
            )
        logger.info(f"resumed {path} in epoch {epoch + 1} after step {progress['steps']}")
        rank = self._process.rank
        loss_sum, samples = progress["loss_sums"][rank], int(progress["samples"][rank])
        return epoch, Tally(self._process.device, int(progress["steps"]), loss_sum, samples)

    def between_steps(self, epoch: int, tally: Tally) -> None:
        """Write a recovery checkpoint if one is due or a signal came; after a signal, stop.

        Raises:
            Stopped: after a signal, with what to do next.
        """
        stop = self.must_stop()
        if stop or self._is_due(epoch, tally.steps):
            self.save(epoch, tally)
        if stop:
            raise self.stopped()

    def _is_due(self, epoch: int, steps: int) -> bool:
        """Whether a multiple of `recovery_interval` was reached since the last time (steps may come in groups)."""
        interval = self._cfg.recovery_interval
        mark = (epoch, steps // interval) if interval else self._mark
        due = mark > self._mark and mark[1] > 0
        self._mark = max(mark, self._mark)
        return due

    def must_stop(self) -> bool:
        """Whether any process got a signal; all get the same answer."""
        return self._process.any(self.stop.signal_number is not None)

    def stopped(self) -> Stopped:
        """The end of a run that goes on later."""
        number = self.stop.signal_number or signal.SIGTERM  # another process got it
        return Stopped(f"stopped; go on with the same command and --resume {self._store.newest()}", number)

    def save(self, epoch: int, tally: Tally) -> None:
        """Write the recovery checkpoint of this place in the epoch."""
        progress = {
            "steps": tally.steps,
            "loss_sums": self._process.gather(float(tally.loss_sum)),
            "samples": self._process.gather(tally.samples),
        }
        if self._process.is_main:
            self._store.save_recovery(self._state.snapshot(self._cfg), epoch, progress)
        # A process that ended now would make the launcher end the one that writes.
        self._process.wait_for_all()
