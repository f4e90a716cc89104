"""Child processes of the benchmarks: one that measures and ends, and one that does a step when it is asked to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def in_child(
    module: str, arguments: Sequence[str], python: str = sys.executable, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run `python -m module arguments` and return the JSON object on the last line of its output.

    `environment`: variables beside those of this process.

    Raises:
        RuntimeError: the child failed; with the end of what it wrote.
    """
    command = [python, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(environment or {}))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{last} ({' '.join(command)} ended with {done.returncode})\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


class SteppingChild:
    """A process that does one step for each line it reads, called like any other candidate.

    It answers each line with `done`, or with `failed: ` and the reason; other lines that it writes are passed over.

    Raises:
        RuntimeError: at a call, if the step failed or the process ended.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> None:
        self._process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        answer = next((line for line in self._process.stdout if line.startswith(("done", "failed: "))), "")
        if answer.strip() != "done":
            raise RuntimeError(answer.strip() or "the process ended; its message is above")

    def __enter__(self) -> SteppingChild:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()  # closes its input, which ends it
