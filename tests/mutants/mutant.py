"""One planted fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class DoesNotApply(Exception):
    """The text to replace is not in its file exactly once."""


@dataclass(frozen=True)
class Mutant:
    """A one-line fault that somebody could write.

    Attributes:
        area: what it belongs to; the share of faults found is counted by area.
        file: path within the repository.
        old: text that occurs there exactly once.
        new: the fault in its place.
        why: what goes wrong with it, in a few words.
        tests: what finds it: pytest's names, within tests/.
        harmless: why no test can find it (nothing goes wrong); such a fault is expected to survive, and not counted.
    """

    area: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]
    harmless: str = ""

    @property
    def node_ids(self) -> list[str]:
        return [f"tests/{test}" for test in self.tests]

    def mutated(self, source: str) -> str:
        """The text of the file with the fault in it.

        Raises:
            DoesNotApply: the old text occurs there another number of times than once.
        """
        if (count := source.count(self.old)) != 1:
            raise DoesNotApply(f"{self.file}: {self.old!r} occurs {count} times, not once")
        return source.replace(self.old, self.new)


def faults(area: str, *rows: tuple[str, str, str, str, str]) -> list[Mutant]:
    """Mutants of one area: rows of file, old text, new text, what goes wrong, and tests separated by spaces."""
    return [Mutant(area, file, old, new, why, tuple(tests.split())) for file, old, new, why, tests in rows]
