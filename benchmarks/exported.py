"""A trained network in this project and exported: one evaluation pass of each, by batch size.

    python -m benchmarks.exported output/train/demo/model_best.pth.tar --batches 1 16

plain    the model as it is written
ours     with BatchNorm folded and the faster kernels attached
sparse   the same, and convolutions that add the weights of active inputs
pt2      the torch.export program, run by PyTorch
onnx     the ONNX file, run by ONNX Runtime

On real evaluation samples, since firing rates decide the time of `sparse`. All on a CPU with torch's number of threads;
candidates take turns, ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import model as models  # noqa: F401 -- registers the models
from benchmarks.measure import Spread, interleave, on_first_call, print_json, print_table, speedup
from module.accelerate import accelerate
from utils.config.parse import config_from
from utils.config.settings import Config
from utils.data.datasets import resolve_data
from utils.data.loaders import build_eval_loader
from utils.run.build import build_model
from utils.run.checkpoint import load_weights, settings_inside
from utils.run.export_formats import FORMATS, Source

CANDIDATES = ("plain", "ours", "sparse", "pt2", "onnx")


def settings_of(checkpoint: str, batch: int) -> Config:
    """Those of the training, for batches of this size."""
    inside = dict(settings_inside(checkpoint) or {})
    return config_from(inside | {"workers": 0, "device": "cpu", "kernels": "auto", "val_batch_size": batch})


def build(name: str, checkpoint: str, x: torch.Tensor) -> Callable[[], Any]:
    """One call that evaluates `x` with the candidate."""
    cfg = settings_of(checkpoint, batch=len(x))
    net = build_model(cfg)
    load_weights(net, checkpoint)
    net.eval()
    if name != "plain":
        net.fuse()  # type: ignore[operator]
    if name in ("ours", "sparse"):
        accelerate(net, training=False, engine="sparse" if name == "sparse" else "dense")
    if name in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net"
            FORMATS[name].write(Source(net, torch.cat([x, x])[:2].clone(), cfg, resolve_data(cfg), None), path)
            run: Callable[[torch.Tensor], Any] = FORMATS[name].load(path, net)
    else:
        run = net

    def step() -> None:
        with torch.no_grad():
            run(x)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    results: dict[str, Any] = {}
    for batch in args.batches:
        x = next(iter(build_eval_loader(settings_of(args.checkpoint, batch), device=cpu)))[0]
        steps = {name: on_first_call(functools.partial(build, name, args.checkpoint, x)) for name in args.candidates}
        seconds = interleave(steps, rounds=args.rounds, device=cpu)
        rows = []
        for name in seconds:
            time, gain = Spread.of(seconds[name]), speedup(seconds, args.candidates[0], name)
            results[f"{name}, batch {batch}"] = {"ms": time.median * 1e3, "speedup": gain.median}
            spread = f"{gain.low:.2f} to {gain.high:.2f}"
            rows.append([name, f"{time.median * 1e3:.2f}", f"{gain.median:.2f}x", spread])
        print(f"batch {batch}:")
        print_table(["candidate", "ms", "speed-up", "quartiles"], rows, seconds.failed)
    print_json("benchmarks.exported", results, cpu, None)


if __name__ == "__main__":
    main()
