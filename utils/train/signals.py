"""Stopping in good order: a signal is noted, and acted on between two steps."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from utils.train.run_files import logger

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
