"""Kills runs at random and compares their results with one that was never stopped: `python -m tests.kill --minutes 5`.

Each round has a seed, which is printed and repeats it. It chooses the number of processes, the kind of run, which
process dies, and when: at a step, at a change of a file on its way to the disk, or after a random time. Every killed
run goes on with `--resume auto`; at its end, weights, moving average, optimizer, history and summaries must agree.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]  # as pytest does it

import processes  # noqa: E402
from test_recovery import TINY, VARIANTS, arguments, assert_same, outcome, run_whole  # noqa: E402
from tiny import quick  # noqa: E402

_KINDS = {"": [], **VARIANTS}


def one_round(seed: int, folder: Path, most_kills: int = 6) -> str:
    """Kill a run some times, let it finish, and compare; a line that says what was done.

    Raises:
        AssertionError: a run ended otherwise than by its kill, or the results differ.
    """
    draw = random.Random(seed)
    world_size, kind = draw.choice((1, 1, 2)), draw.choice(list(_KINDS))
    options = ["-b", str(48 // world_size), *_KINDS[kind], "--epochs", str(draw.randint(2, 4))]
    options += ["--recovery-interval", str(draw.choice((0, 1, 2)))]
    whole, killed = folder / "whole", folder / "killed"
    for place in (whole, killed):
        place.mkdir()
        (place / "tiny.yml").write_text(quick(TINY))
    run_whole(whole, world_size, *options)
    kills = [_kill_once(draw, killed, world_size, options) for _ in range(draw.randint(1, most_kills))]
    run_whole(killed, world_size, *options)
    assert_same(outcome(whole), outcome(killed))
    assert not list((killed / "output/train/run").glob(".*.partial"))
    return f"{world_size} process(es), {kind or 'plain'}, killed {', '.join(kills)}: the same bits"


def _kill_once(draw: random.Random, folder: Path, world_size: int, options: list[str]) -> str:
    """Start or continue the run, and kill one or all of its processes."""
    argv = arguments(*options, "-j", draw.choice(("0", "0", "0", "2")))
    victims = draw.choice([[0], [world_size - 1], list(range(world_size))])
    events = draw.randint(1, 25) if draw.random() < 0.6 else 0
    children = [
        processes.start(processes.train_until, argv, events, env=env, cwd=folder)
        if events and rank in victims
        else processes.start(processes.train, argv, env=env, cwd=folder)
        for rank, env in enumerate(processes.ranks(world_size) if world_size > 1 else [{}])
    ]
    if not events:
        time.sleep(draw.uniform(0.0, 4.0))
        for rank in victims:
            pid = children[rank].pid
            if pid is not None and children[rank].exitcode is None:
                os.kill(pid, signal.SIGKILL)
    codes = processes.finish(*children)
    # A run that came to its end before its kill is as good; a partner of a killed process ends with 2, or is killed.
    said = (folder / "output.txt").read_text() if (folder / "output.txt").exists() else ""
    assert set(codes) <= {0, 2, -signal.SIGKILL}, f"{codes}\n{said}"
    assert "Traceback" not in said, said
    return f"{victims} at {f'event {events}' if events else 'a random time'}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--seed", type=int, help="of the first round (default: from the clock)")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int(time.time())
    until, rounds = time.monotonic() + 60 * args.minutes, 0
    while rounds == 0 or time.monotonic() < until:
        print(f"seed {seed}: ", end="", flush=True)
        with tempfile.TemporaryDirectory(prefix="kill-") as folder:
            print(one_round(seed, Path(folder)), flush=True)
        seed, rounds = seed + 1, rounds + 1
    print(f"{rounds} rounds, all with the same bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
