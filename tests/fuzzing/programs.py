"""A program with its command line: run in this process, or as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import USAGE_ERROR, UserError

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Program:
    """A call of `main`, which is train.py's or firing_num.py's, with the words of a command line.

    env: variables of the environment beside those that are there
    """

    main: Callable[[list[str]], object]
    argv: list[str]
    env: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> None:
        before = dict(os.environ)
        os.environ.update(self.env)
        try:
            self.main(self.argv)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def in_a_process(self) -> None:
        """As `python train.py ARGV`. What it prints is printed here."""
        run_script(ROOT / f"{self.main.__module__}.py", self.argv, self.env)


def run_script(script: Path, argv: list[str], env: Mapping[str, str]) -> None:
    """Run a script in a process of its own; what it prints is printed here.

    Raises:
        UserError: it ended with status 2 and one message, `SCRIPT: error: ...`.
        RuntimeError: it ended with another status but 0, by a signal, or with a traceback.
    """
    done = subprocess.run(
        [sys.executable, str(script), *argv], capture_output=True, env=os.environ | dict(env), check=False
    )
    said, error = (text.decode(errors="backslashreplace") for text in (done.stdout, done.stderr))
    clean = "Traceback" not in said + error
    if done.returncode == USAGE_ERROR and clean and f"{script.name}: error: " in error:
        raise UserError(error)
    if done.returncode != 0 or not clean:
        raise RuntimeError(f"{script.name} ended with status {done.returncode}:\n{said}{error}")
    print(said, error)
