"""A process that runs cases one after the other; it is replaced when a case hangs or kills it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzzing.cases import Outcome, Result, load_generators, run_case

# Beyond what the process has when it starts; a case that asks for more memory gets a MemoryError.
_MEMORY = 6 * 2**30  # bytes

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["model", "utils.train.trainer", "utils.train.dry_run", "tests.fuzzing.worker"])


class Worker:
    """Runs cases in a process of its own.

    Args:
        limit: seconds after which a case counts as a hang.
        prepare: called in the process first; registers what makes cases.
    """

    def __init__(self, limit: float, prepare: Callable[[], None] = load_generators) -> None:
        self._limit, self._prepare = limit, prepare
        self._start()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self._process = _context.Process(target=_serve, args=(theirs, self._folder, self._prepare))
        self._process.start()
        theirs.close()
        self._connection.recv()  # it has imported everything: that is no part of a case

    def run(self, name: str, seed: int, number: int) -> Result:
        self._connection.send((name, seed, number))
        what = "(not known: the case did not come to an end)"
        if not self._connection.poll(self._limit):
            self.close()
            self._start()
            return Result(name, seed, number, what, Outcome.HANG, f"nothing after {self._limit:g} s")
        try:
            result = self._connection.recv()
        except EOFError:
            self._process.join()
            text = f"the process ended with status {self._process.exitcode}"
            self.close()
            self._start()
            return Result(name, seed, number, what, Outcome.DIED, text)
        assert isinstance(result, Result)
        return result

    def close(self, patience: float = 0.0) -> None:
        """End the process: by itself within `patience` seconds, which it does between two cases, or killed."""
        self._connection.close()
        self._process.join(patience)
        with contextlib.suppress(ProcessLookupError):  # with the loader processes that a hanging case has
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(patience=10.0)


def _serve(connection: Connection, folder: Path, prepare: Callable[[], None]) -> None:
    os.setsid()
    prepare()
    import torch

    torch.set_num_threads(1)
    _limit_memory()
    connection.send("ready")
    while True:
        try:
            name, seed, number = connection.recv()
        except EOFError:
            return
        place = folder / f"{name}-{number}"
        place.mkdir()
        os.chdir(place)
        connection.send(run_case(name, seed, number, place))
        os.chdir(folder)
        shutil.rmtree(place, ignore_errors=True)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
