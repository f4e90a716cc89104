"""Gives random bad input to the programs: `python -m tests.fuzz --cases 1000 --seed 1`.

Each case must run, or end in one message that names the key or the file, with status 2. A traceback, a hang, a death,
and silence about something that is not valid are faults; each is shown with the command that repeats it. A share of the
cases run as a user runs them: a script in a process of its own, judged by its status and by what it prints.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.fuzzing.cases import GENERATORS, Outcome, Result, load_generators, shared_out
from tests.fuzzing.worker import Worker
from utils.output import keep_going_without_output


def main() -> int:
    keep_going_without_output()
    load_generators()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="number of cases (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--only", nargs="+", choices=sorted(GENERATORS), help="kinds of input (default: all)")
    parser.add_argument("--case", type=int, help="run the case of this number alone, and show what it says")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds of a case (default: 180)")
    parser.add_argument("--verbose", action="store_true", help="show every case")
    args = parser.parse_args()
    names = args.only or sorted(GENERATORS)
    started = time.perf_counter()
    results = []
    with Worker(args.limit) as worker:
        for name, count in shared_out(args.cases, names).items():
            for number in [args.case] if args.case is not None else range(count):
                result = worker.run(name, args.seed, number)
                results.append(result)
                if result.outcome.is_fault or args.verbose or args.case is not None:
                    print(result, flush=True)
    print(summary(results))
    faults = sum(result.outcome.is_fault for result in results)
    print(f"{len(results)} cases, seed {args.seed}, {time.perf_counter() - started:.0f} s: {faults} faults")
    return 1 if faults else 0


def summary(results: list[Result]) -> str:
    """A line for each generator: how many cases had which outcome."""
    counts = {name: Counter(r.outcome for r in results if r.generator == name) for name in GENERATORS}
    lines = [" " * 14 + "".join(f"{outcome:>10}" for outcome in Outcome)]
    for name, found in counts.items():
        if found:
            lines.append(f"{name:14}" + "".join(f"{found[outcome] or '.':>10}" for outcome in Outcome))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
