"""What the terminal shows while a script runs: the log, and how much is done."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm

from utils.run.distributed import Process

logger = logging.getLogger("sdt")


def setup_logging(process: Process) -> None:
    """Log to the terminal, from the main process only."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if process.is_main else logging.ERROR)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 0:00:12."""
    return str(timedelta(seconds=round(seconds)))


def peak_memory(device: torch.device) -> str:
    """The most memory this process has held so far, on the GPU or, without one, in all."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        try:
            import resource
        except ImportError:  # Windows
            return "memory not known"
        # In bytes on macOS, in KiB elsewhere.
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{held / 2**30:.1f} GiB"


_LONGEST_SILENCE = 60.0  # seconds


class Progress:
    """Shows how much of an epoch is done: a progress bar in a terminal, else a log line from time to time.

    Args:
        title: what is shown first.
        steps: steps of the whole epoch.
        images_per_step: over all processes.
        interval: steps between two readings of the loss, and between two log lines; if they take longer than a minute,
            the step at its end has a line too.
        show: whether this process shows anything.
        done: steps done before.
    """

    def __init__(self, title: str, steps: int, images_per_step: int, interval: int, show: bool, done: int = 0) -> None:
        self._title, self._steps, self._images, self._interval = title, steps, images_per_step, interval
        self._show, self._before, self._started = show, done, time.perf_counter()
        self._shown = self._started  # when the last line was written
        style: dict[str, Any] = dict(unit="step", leave=False, dynamic_ncols=True)
        self._bar = tqdm(total=steps, initial=done, desc=title, disable=not (show and sys.stdout.isatty()), **style)

    def step(self, done: int, loss: Callable[[], float] | None = None) -> None:
        """Called after each step; the loss is read from the device only when it is shown."""
        if not self._show:
            return
        now = time.perf_counter()
        due = done % self._interval == 0 or done == self._steps or now - self._shown > _LONGEST_SILENCE
        seconds = (now - self._started) / (done - self._before)
        self._shown = now if due else self._shown
        speed = self._images / seconds
        if not self._bar.disable:
            self._bar.update(done - self._bar.n)
            if due:
                self._bar.set_postfix_str(f"{f'loss {loss():.4f}, ' if loss else ''}{speed:.0f} images/s")
        elif due and done < self._steps:
            left = clock(seconds * (self._steps - done))
            shown = f"loss {loss():.4f}  " if loss else ""
            logger.info(f"{self._title}  step {done}/{self._steps}  {shown}{speed:.0f} images/s  {left} left")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
