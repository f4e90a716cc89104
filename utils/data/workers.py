"""How the processes that load samples start and end."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import multiprocessing.util  # before the registration below: its own must run after it
import os
import signal
import threading
from collections.abc import Sequence


def tie_to_the_main_process(worker: int) -> None:
    """Called in a new worker: it ignores signals, which the main process handles, and ends when that one ends."""
    # The terminal or the cluster sends Ctrl-C and SIGTERM to the workers too, while the main process finishes its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # When the main process is killed, its workers do not end by themselves. torch and Linux can watch the parent of a
    # worker; but that may be the fork server, which ends only after its workers.
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def start_worker(worker: int, plugins: Sequence[str] = ()) -> None:
    """Tie a worker to the main process, and import the modules `plugins`: a worker that was not forked lacks them."""
    tie_to_the_main_process(worker)
    for name in plugins:
        importlib.import_module(name)


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


@atexit.register
def _end_workers() -> None:
    # At its exit, Python sends SIGTERM to workers that still run and waits for them; they ignore it, so it would wait
    # for ever. This function was registered later, so it runs before that.
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report an error
    for process in left:
        process.kill()
