"""The error a user can put right, and how a script ends on it."""

from __future__ import annotations

import difflib
import errno
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from utils.output import keep_going_without_output

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports: a launcher must not take Ctrl-C for success


# What the user can put right about a disk or a name on it: full, over quota, read-only, not theirs, too long.
_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    # A folder in the place of a file, or a file in that of a folder; links in a circle.
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
)

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxother, _SHORT.maxstring = 2, 60, 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


class UserError(ValueError):
    """A configuration, data set, checkpoint or flag that the user can put right.

    The message names the file or key, the bad value, the valid values and the remedy.
    """

    # Processes that start alike fail alike: then one of them speaks for all. Inside a running group, where one
    # may fail alone, `utils.run.distributed` finds out who speaks and sets this to False.
    in_every_process = True


class NonFiniteError(UserError):
    """Training ran into NaN or infinity; raised before that spoils the weights, or a checkpoint."""


class Stopped(Exception):
    """A signal ended the run in good order; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number  # what a shell reports


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name` (letter case, '-' and '_' aside), or None if none is close."""
    by_plain_name = {_plain(candidate): candidate for candidate in valid}
    match = difflib.get_close_matches(_plain(name), by_plain_name, n=1)
    return by_plain_name[match[0]] if match else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' to append to a message, or '' if no valid name is close."""
    match = nearest(name, valid)
    return f"; did you mean {match}?" if match else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shortened(value: object) -> str:
    """A value of any size and depth as Python writes it, for a message; cut to one short line."""
    try:
        return one_line(_SHORT.repr(value))
    except ValueError:  # Python refuses to write integers of more than 4,300 digits
        return "a number of thousands of digits"


def one_line(text: str, limit: int = 80) -> str:
    """The first `limit` characters of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."


def listed(names: Sequence[str], limit: int = 6) -> str:
    """The first `limit` names for a line of text, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def run_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Run `main` on the command line's arguments and exit with the status it returns.

    A `UserError` ends in one message and status 2, Ctrl-C in one line and status 130, a run that a signal stopped
    in its own message and 128 + the signal. Any other exception is a defect of the program and keeps its traceback.
    Of several processes, one speaks. Output that cannot be written any more is dropped (`utils.output`).
    """
    script = Path(sys.argv[0]).name
    keep_going_without_output()
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        if _speaks() or not error.in_every_process:
            print(f"{script}: error: {error}", file=sys.stderr)
        status = USAGE_ERROR
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        remedy = "check the name, the free space and the rights there"
        print(f"{script}: error: {error.strerror}{where}; {remedy}", file=sys.stderr)
        status = USAGE_ERROR
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        remedy = "make batch_size, time_steps or the model smaller; train.py --dry-run tells what a run needs"
        print(f"{script}: error: out of memory: {first_line(error)}; {remedy}", file=sys.stderr)
        status = USAGE_ERROR
    except Stopped as stop:
        if _speaks():
            print(f"{script}: {stop}", file=sys.stderr)
        status = stop.status
    except KeyboardInterrupt:
        if _speaks():
            print(f"{script}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def _is_out_of_memory(error: BaseException) -> bool:
    """Also torch's errors, whose classes are not known here: this file imports no torch."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return "MemoryError" in names or "OutOfMemoryError" in names or "can't allocate memory" in str(error)


def _speaks() -> bool:
    """Whether this process is the first of a launcher's, or the only one; also if its place makes no sense."""
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and world_size.isdecimal():
        return not 0 < int(rank[:12]) < int(world_size[:12])
    if "RANK" in os.environ:
        return True
    return os.environ.get("SLURM_PROCID", "0") == "0" or os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"


def _plain(name: str) -> str:
    return name.casefold().replace("_", "-").lstrip("-")
