"""Plants each fault in a copy of the repository and runs the tests that must find it: `python -m tests.mutants`.

Prints a line per fault (killed, SURVIVED, harmless, DOES NOT APPLY, BROKEN), then the share killed by area. Exits with
1 if that is below 90 % in an area, or if a fault could not be tried.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from .all import AREAS, MUTANTS
from .mutant import DoesNotApply, Mutant
from .runner import copy_repository, keep_within, run_tests

WANTED = 0.9
KILLED, SURVIVED, HARMLESS, DOES_NOT_APPLY, BROKEN = "killed", "SURVIVED", "harmless", "DOES NOT APPLY", "BROKEN"
# Exit codes of pytest.
_PASSED, _FAILED = 0, 1


def main() -> int:
    arguments = _arguments()
    chosen = [m for m in MUTANTS if m.area in arguments.area and arguments.text in f"{m.file} {m.why} {m.new}"]
    if not chosen:
        sys.exit("tests.mutants: no fault has that area and text")
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.area:12}  {mutant.file}: {mutant.why}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        keep_within(Path(folder))
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(arguments.jobs):
            copies.put(copy_repository(Path(folder) / str(number)))
        if not arguments.no_check:
            _check_unchanged(chosen, copies, arguments.timeout)
        results = _try_all(chosen, copies, arguments.jobs, arguments.timeout)
    return _summary(results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("--area", nargs="+", choices=AREAS, default=list(AREAS), help="of these areas only")
    parser.add_argument("--text", default="", help="only faults with this text in their file, reason or code")
    parser.add_argument("--list", action="store_true", help="list the faults, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once (default: 1)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds until a fault counts as one that hangs")
    parser.add_argument("--no-check", action="store_true", help="do not run the tests on the unchanged source first")
    return parser.parse_args()


def _check_unchanged(chosen: list[Mutant], copies: SimpleQueue[Path], timeout: float) -> None:
    """End here if a test fails without any fault: it would seem to find all of them."""
    tests = dict.fromkeys(test for mutant in chosen for test in mutant.node_ids)
    folder = copies.get()
    code, output = run_tests(folder, tests, timeout * 10)
    copies.put(folder)
    if code != _PASSED:
        print(output[-4000:])
        sys.exit("tests.mutants: these tests do not pass on the unchanged source")


def _try_all(chosen: list[Mutant], copies: SimpleQueue[Path], jobs: int, timeout: float) -> list[tuple[Mutant, str]]:
    def outcome(mutant: Mutant) -> tuple[Mutant, str]:
        folder, started = copies.get(), time.monotonic()
        try:
            found, detail = _outcome(mutant, folder, timeout)
        finally:
            copies.put(folder)
        seconds = time.monotonic() - started
        print(f"{found:14}  {mutant.area:12}  {seconds:5.1f} s  {mutant.file}: {mutant.why}{detail}", flush=True)
        return mutant, found

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(outcome, chosen))


def _outcome(mutant: Mutant, folder: Path, timeout: float) -> tuple[str, str]:
    path = folder / mutant.file
    source = path.read_text()
    try:
        path.write_text(mutant.mutated(source))
    except DoesNotApply as error:
        return DOES_NOT_APPLY, f"\n    {error}"
    try:
        code, output = run_tests(folder, mutant.node_ids, timeout)
    finally:
        path.write_text(source)
    if code == _PASSED:
        return (HARMLESS, f" ({mutant.harmless})") if mutant.harmless else (SURVIVED, "")
    if code in (_FAILED, None):
        return KILLED, ""
    return BROKEN, f"\n{output[-2000:]}"  # the tests could not run at all


def _summary(results: list[tuple[Mutant, str]]) -> int:
    """Print the shares; the exit status."""
    by_area: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant, found in results:
        by_area[mutant.area][found] += 1
    print(f"\n{'area':12}  planted  killed  share")
    status = 0
    for area, counts in by_area.items():
        planted = sum(counts.values()) - counts[HARMLESS]
        share = counts[KILLED] / planted if planted else 1.0
        print(f"{area:12}  {planted:7}  {counts[KILLED]:6}  {share:5.0%}")
        if share < WANTED or counts[DOES_NOT_APPLY] or counts[BROKEN]:
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
