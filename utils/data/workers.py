"""How the processes that load samples start and end."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util  # before the registration below: its own must run after it
import os
import signal
import threading


def tie_to_the_main_process(worker: int) -> None:
    """A worker does this first: it leaves signals to the main process, and ends with it."""
    # Ctrl-C and a cluster's SIGTERM reach the workers too, while the main process still finishes its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A killed main process ends nobody. torch's workers look for a change of their parent's number, and Linux can send
    # a signal when the parent dies; but the parent of a worker may be the fork server, which lives as long as it does.
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


@atexit.register
def _end_workers() -> None:
    # Python ends what workers are left by SIGTERM, which they ignore, and would wait for them for ever. This runs
    # before that, since it was registered later.
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a failure
    for process in left:
        process.kill()
