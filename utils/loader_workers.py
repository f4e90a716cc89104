"""How the processes that load samples start and end, and how an error of theirs reaches the user."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.util  # before the registration below: its own must run after it
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from utils.errors import UserError

Item = TypeVar("Item")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tie_to_the_main_process(worker: int) -> None:
    """A worker does this first: it leaves signals to the main process, and ends with it."""
    # Ctrl-C and a cluster's SIGTERM reach the workers too, while the main process still finishes its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        # When the main process is killed, its workers must not outlive it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if multiprocessing.get_start_method() == "fork" and parent is not None and os.getppid() != parent.pid:
            os.kill(os.getpid(), signal.SIGKILL)  # it was killed before the line above


@atexit.register
def _end_workers() -> None:
    # Python ends what workers are left by SIGTERM, which they ignore, and would wait for them for ever. This runs
    # before that, since it was registered later.
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a failure
    for process in left:
        process.kill()


def in_own_words(batches: Iterable[Item]) -> Iterator[Item]:
    """`batches`; a UserError of a worker process with its message alone, which arrives below a traceback."""
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from error
