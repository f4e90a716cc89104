"""A case of the fuzz, the registry of what makes cases, and the judgement of what became of one."""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.fuzzing.programs import Program
from utils.errors import USAGE_ERROR, UserError

# A process of its own takes seconds to start: of a generator's calls of programs, one of this many has one.
SHARE_OF_PROCESSES = 50


class Outcome(StrEnum):
    """What became of a case. The first three are right, the others are faults of the program."""

    OK = "ok"  # it ran
    SAID = "said"  # it ran, and a line of the log names what is odd
    REFUSED = "refused"  # one message that names the key or the file, status 2
    UNNAMED = "unnamed"  # refused, and the message names neither
    WRONG = "wrong"  # refused, although it is valid
    SILENT = "silent"  # it ran without a word, although it is not valid
    TRACEBACK = "traceback"
    HANG = "hang"
    DIED = "died"  # the process ended, by a signal or for lack of memory

    @property
    def is_fault(self) -> bool:
        return self not in (Outcome.OK, Outcome.SAID, Outcome.REFUSED)


@dataclass(frozen=True)
class Case:
    """One input, and what is known about it.

    what: what is given, in a line for the report
    call: gives it to the program, as `train.main(argv)` does; raises what the program raises
    names: a message must contain one of these: the key, or the file
    valid: whether the program must take it (True) or must object to it (False); None where either is right
    """

    what: str
    call: Callable[[], object]
    names: tuple[str, ...]
    valid: bool | None = None


@dataclass(frozen=True)
class Result:
    """The outcome of a case, with the message or the traceback."""

    generator: str
    seed: int
    number: int
    what: str
    outcome: Outcome
    text: str

    def __str__(self) -> str:
        again = f'--only "{self.generator}" --seed {self.seed} --case {self.number}'
        return f"{self.outcome:9}  {self.what}\n           again: python -m tests.fuzz {again}\n{_indented(self.text)}"


# (random numbers, an empty folder, in which the case will also run) -> a case
Generator = Callable[[random.Random, Path], Case]

GENERATORS: dict[str, Generator] = {}
SHARES: dict[str, float] = {}


def generator(name: str, share: float = 1.0) -> Callable[[Generator], Generator]:
    """Register a function that makes cases; `share` says how many, beside the 1.0 of the others."""

    def register(function: Generator) -> Generator:
        GENERATORS[name], SHARES[name] = function, share
        return function

    return register


def load_generators() -> None:
    """Import every file of `tests/fuzzing/generators`."""
    folder = Path(__file__).parent / "generators"
    for found in pkgutil.iter_modules([str(folder)]):
        importlib.import_module(f"tests.fuzzing.generators.{found.name}")


def shared_out(cases: int, names: Sequence[str]) -> dict[str, int]:
    """How many of `cases` each generator makes: by its share, at least one; together `cases`, if that is enough."""
    total = sum(SHARES[name] for name in names)
    bounds = [round(cases * sum(SHARES[name] for name in names[:last]) / total) for last in range(len(names) + 1)]
    return {name: max(1, bounds[n + 1] - bounds[n]) for n, name in enumerate(names)}


def make_case(name: str, seed: int, number: int, folder: Path) -> Case:
    """The case of these numbers: always the same. Its files are written to `folder`."""
    return GENERATORS[name](random.Random(f"{name} {seed} {number}"), folder)


def run_case(name: str, seed: int, number: int, folder: Path) -> Result:
    """Make a case in `folder`, which is the present one, and run it: in this process, or as a user would."""
    case = make_case(name, seed, number, folder)
    call, what, said = case.call, case.what, io.StringIO()
    if isinstance(call, Program) and number % SHARE_OF_PROCESSES == SHARE_OF_PROCESSES - 1:
        call, what = call.in_a_process, f"in a process: {what}"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            call()
        outcome, text = _after_a_run(case, said.getvalue()), said.getvalue()
    except UserError as error:
        outcome, text = _after_a_refusal(case, str(error)), str(error)
    except SystemExit as stop:
        text = said.getvalue()
        outcome = _after_a_refusal(case, text) if stop.code == USAGE_ERROR else _after_a_run(case, text)
    except BaseException:
        outcome, text = Outcome.TRACEBACK, traceback.format_exc()
    return Result(name, seed, number, _printable(what), outcome, _printable(text))


def _after_a_run(case: Case, said: str) -> Outcome:
    named = _names(case, said)
    if case.valid is False and not named:
        return Outcome.SILENT
    return Outcome.SAID if named and case.valid is not True else Outcome.OK


def _after_a_refusal(case: Case, message: str) -> Outcome:
    if case.valid:
        return Outcome.WRONG
    return Outcome.REFUSED if _names(case, message) else Outcome.UNNAMED


def _names(case: Case, text: str) -> bool:
    return any(name in text or name.replace("_", "-") in text for name in case.names)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _indented(text: str, most: int = 16) -> str:
    lines = [f"           | {line[:200]}" for line in text.splitlines()]
    return "\n".join(lines if len(lines) <= most else [*lines[:5], "           | ...", *lines[-(most - 6) :]])
