"""Output that goes away: a pipe that nobody reads any more, a full disk, a terminal that was closed.

The work of a program is in its files. So it goes on without output, and says so where it can.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TextIO


class _Lasting(io.RawIOBase):
    """The bytes of an output; from the first error on they are dropped, so that nothing above ever sees an error."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # a pipe that is full for the moment, and was told not to wait
            select.select([], [self._descriptor], [])
            return 0
        except OSError as error:
            self._drop(error)
            return len(data)

    def _drop(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._descriptor)  # also for what libraries write there
        os.close(nowhere)
        # Whoever closes a pipe (`| head`) has seen enough.
        if error.errno != errno.EPIPE and self._name != "stderr":
            print(f"{self._name} cannot be written ({error.strerror}); going on without it", file=sys.stderr)


def keep_going_without_output() -> None:
    """Let stdout and stderr drop what they cannot write, and characters that their encoding lacks be shown as escapes.

    Replaced streams, as in tests, are left alone.
    """
    # The numbers 0 to 2 belong to the streams, or the next file that is opened gets what is printed.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(sys.stdout, 1, "stdout")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(sys.stderr, 2, "stderr")


def _lasting(stream: TextIO | None, descriptor: int, name: str) -> TextIO:
    encoding = stream.encoding if stream is not None else "utf-8"
    if stream is not None:
        stream.flush()
    raw = _Lasting(descriptor, name)
    # The stubs ask for methods that only readers have.
    buffered = io.BufferedWriter(raw)  # type: ignore[type-var]
    # Errors are shown at once, and what a terminal shows line by line.
    by_line = name == "stderr" or raw.isatty()
    return io.TextIOWrapper(buffered, encoding=encoding, errors="backslashreplace", line_buffering=by_line)
