"""Batches of the embedded digits through the training loader (crop, resize, normalise), by number of workers.

    python -m benchmarks.loader --workers 0 1 2

One value is the time of an epoch without its first two batches, in which workers start. The baseline is the first
entry of --workers. To see whether loading holds training back, compare images/s with benchmarks/train_step.py.
"""

from __future__ import annotations

import argparse
import functools
from itertools import islice

import torch

from benchmarks.measure import Call, Spread, interleave, on_first_call, print_json, print_table, speedup
from utils.config.parse import config_from, load_yaml
from utils.data.loaders import build_loaders

CONFIG = "conf/digits/1_64_15E_t4.yml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    images: dict[str, int] = {}

    def candidate(workers: int) -> Call:
        call, images[str(workers)] = epoch(args.config, workers)
        return call

    calls = {str(workers): on_first_call(functools.partial(candidate, workers)) for workers in args.workers}
    seconds = interleave(calls, rounds=args.rounds)
    rows, results = [], {}
    for name in seconds:
        time, gain = Spread.of(seconds[name]), speedup(seconds, str(args.workers[0]), name)
        rows.append([name, f"{images[name] / time.median:.0f}", f"{gain.median:.2f}x"])
        results[name] = {"images_per_second": images[name] / time.median, "speedup": gain.median}
    print_table(["workers", "images/s", "speed-up"], rows, seconds.failed)
    print_json("benchmarks.loader", results, failed=seconds.failed)


def epoch(config: str, workers: int) -> tuple[Call, int]:
    """A call that fetches the batches of an epoch after the second, and how many images those are."""
    settings = load_yaml(config).as_dict() | {"workers": workers}
    cfg = config_from(settings)
    loaders = build_loaders(cfg, device=torch.device("cpu"))
    batches = len(loaders.train)

    def call() -> object:
        loaders.set_epoch(0)
        fetched = iter(loaders.train)
        for _ in islice(fetched, 2):
            pass
        return sum(len(x) for x, _ in fetched)

    return call, (batches - 2) * cfg.batch_size


if __name__ == "__main__":
    main()
