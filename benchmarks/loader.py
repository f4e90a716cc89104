"""Batches of the embedded digits through the training loader (crop, resize, normalise), by number of workers.

    python -m benchmarks.loader --workers 0 1 2

One value is the time of an epoch without its first two batches, in which workers start. The baseline is the first
entry of --workers. To see whether loading holds training back, compare images/s with benchmarks/train_step.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice

import torch

from benchmarks.measure import Spread, interleave, print_json, print_table, speedup
from utils.config.parse import config_from, load_yaml
from utils.data.loaders import build_loaders

CONFIG = "conf/digits/1_64_15E_t4.yml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    made = {str(workers): epoch(args.config, workers) for workers in args.workers}
    seconds = interleave({name: call for name, (call, _) in made.items()}, rounds=args.rounds)
    rows, results = [], {}
    for name, (_, images) in made.items():
        time, gain = Spread.of(seconds[name]), speedup(seconds, str(args.workers[0]), name)
        rows.append([name, f"{images / time.median:.0f}", f"{gain.median:.2f}x"])
        results[name] = {"images_per_second": images / time.median, "speedup": gain.median}
    print_table(["workers", "images/s", "speed-up"], rows)
    print_json("benchmarks.loader", results)


def epoch(config: str, workers: int) -> tuple[Callable[[], object], int]:
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
