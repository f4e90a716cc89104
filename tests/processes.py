"""Child processes for tests: started from a server that has imported everything, so that each starts in no time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["model", "utils.train.trainer", "utils.train.dry_run", "processes"]
    + [f"utils.{name}" for name in ("measure.sweep", "measure.verify", "report.attention_picture", "report.files")]
)


def start(target: Callable[..., Any], *args: Any, env: dict[str, str] | None = None, cwd: Path) -> BaseProcess:
    """Run `target(*args)` in a child; what it prints goes to `cwd/output.txt`."""
    process = _context.Process(target=_run, args=(target, args, env or {}, cwd))
    process.start()
    return process


def finish(*processes: BaseProcess, idle: float = 60.0, most: float = 900.0) -> list[int | None]:
    """Wait for the children; their exit codes, negative for signals. A child that hangs is killed.

    A busy machine makes a child slow, but a child that hangs computes nothing: it is one that has used no processor for
    `idle` seconds. One that has not ended after `most` seconds hangs too, in an endless loop.
    """
    started = time.monotonic()
    for process in processes:
        used, since = _seconds_of_processor(process), time.monotonic()
        while process.exitcode is None:
            process.join(1.0)
            now = _seconds_of_processor(process)
            if now > used:
                used, since = now, time.monotonic()
            if process.exitcode is None and (time.monotonic() - since > idle or time.monotonic() - started > most):
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


def _seconds_of_processor(process: BaseProcess) -> float:
    """What a process and the children that it has waited for have used; 0 where that is not known."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(float, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def ranks(world_size: int) -> list[dict[str, str]]:
    """The environments a launcher would give to `world_size` processes of one node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _run(target: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], cwd: Path) -> None:
    os.environ.update(env)
    os.chdir(cwd)
    import torch

    # One thread each: two processes share two cores, and sums come out the same everywhere.
    torch.set_num_threads(1)
    with Path("output.txt").open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            status = target(*args)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
            status = 1
    os._exit(status if isinstance(status, int) else 0)


def script(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """What `python train.py ARGV` does."""
    import sys

    from utils.errors import run_script

    sys.argv = ["train.py", *argv]
    run_script(main)


def train(argv: list[str], *, curves: bool = False) -> None:
    """Without drawing the curves at the end, which takes as long as a small run."""
    import train as entry
    from utils.train import trainer

    if not curves:
        trainer.draw_curves = lambda folder: folder / "curves.png"
    script(entry.main, argv)


def firing_num(argv: list[str]) -> None:
    import firing_num as entry

    script(entry.main, argv)


def train_until(argv: list[str], events: int) -> None:
    """Train, and kill this process at its `events`-th event: a step, or a change of a file on the way to disk."""
    import train as entry
    from utils import files
    from utils.train import checkpoint_store, trainer
    from utils.train.run_files import RunLog
    from utils.train.step import TrainStep

    left = events

    def dies_after(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    TrainStep.run = dies_after(TrainStep.run)  # type: ignore[method-assign]
    RunLog.epoch = dies_after(RunLog.epoch)  # type: ignore[method-assign]
    trainer.evaluate = dies_after(trainer.evaluate)
    checkpoint_store._link = dies_after(checkpoint_store._link)

    class Os:
        """The `os` that files are renamed with."""

        fsync = staticmethod(dies_after(os.fsync))
        replace = staticmethod(dies_after(os.replace))

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    files.os = Os()  # type: ignore[attr-defined]

    import torch

    saved = torch.save

    def torn(state: Any, file: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        saved(state, file)

    torch.save = torn
    script(entry.main, argv)
