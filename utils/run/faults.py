"""Other processes that ended: those that load samples, and partners of the run. One message instead of a traceback."""

from __future__ import annotations

import re
import traceback

from utils.errors import UserError

_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([0-9, ]+)\)")
_SHARED_MEMORY = "shared memory"
_GONE = re.compile(
    r"(closed|reset|refused) by (peer|remote)|connection (was )?(closed|reset|refused|aborted)|broken pipe|"
    r"remote process exited|timed? ?out",
    re.IGNORECASE,
)
_AGAIN = "continue with the same command and --resume auto"


def ended_worker(error: BaseException) -> UserError | None:
    """The message for an error of torch that says that a loader process has ended; None for any other error."""
    text = str(error)
    found = _WORKER.search(text) if isinstance(error, RuntimeError) else None
    if found is None and not (isinstance(error, ConnectionError | EOFError) and _on_the_way_from_a_worker(error)):
        return None
    who = f"workers: a process that loads samples{f' (pid {found[1]})' if found else ''}"
    if _SHARED_MEMORY in text:
        return UserError(
            f"{who} ended for lack of shared memory; make /dev/shm larger (docker run --shm-size=8g), or use fewer "
            f"--workers; then {_AGAIN}"
        )
    return UserError(
        f"{who} was killed or ended by itself, most often for lack of memory; use fewer --workers or a smaller "
        f"--batch-size, then {_AGAIN}"
    )


def _on_the_way_from_a_worker(error: BaseException) -> bool:
    """Whether a batch was being received: torch asks its sender for the memory that holds it."""
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return bool(names & {"rebuild_storage_fd", "rebuild_storage_filename", "_try_get_data"})


def lost_partner(error: BaseException) -> UserError | None:
    """The message for a connection to another process of the run that has ended; None for any other error."""
    if not isinstance(error, RuntimeError) or not _GONE.search(str(error)):
        return None
    return UserError(
        "another process of the run has ended without a message, so this one ends too: it was killed, most often for "
        f"lack of memory, or its machine was lost; {_AGAIN}"
    )
