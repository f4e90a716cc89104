"""What an evaluation from spikes to spikes spends its time on: by layer, and by kind of work.

    python -m benchmarks.sparse_shares output/train/small_2_64/model_best.pth.tar --threads 2 --dims 64 512

Networks and images as in benchmarks/twin.py. The time of a layer is taken between the points at which all threads meet;
that of its parts in the kernels, built with -DSPARSE_PROFILE for this benchmark alone, per block of pixels, and divided
by the number of threads:

lists     bits with zeros around, lists of active inputs
sums      additions of weights; the tables, where a layer adds from tables
neurons   neurons and packing of their spikes to bits, values written for a shortcut
waiting   the rest: threads that wait for others, and everything else
outside   the call without its layers: Python, memory, the copy of the image, threads started and ended
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import print_json, print_table
from benchmarks.twin import CPU, networks, trained
from model import SpikeDrivenTransformer
from module.accelerate import accelerate
from module.kernels import native
from module.sparse import library
from module.sparse.inference import SparseInference
from utils.run.allocator import keep_freed_memory

PARTS = ("lists", "sums", "neurons")
KINDS = {
    library.IMAGE: "image",
    library.CONVOLVE: "convolution",
    library.FIRE: "neurons",
    library.ATTEND: "attention",
    library.POOL_SPIKES: "pooling",
    library.POOL_VALUES: "pooling",
    library.MEAN: "mean",
}


def profiled_kernels() -> None:
    """Let this process run kernels that take the time of their parts."""
    flags = (*library.LIBRARY.flags, "-DSPARSE_PROFILE")
    kernels = library.typed(native.load(dataclasses.replace(library.LIBRARY, name="sparse_profile", flags=flags)))
    library.load = lambda: kernels  # type: ignore[assignment]


def shares_of(model: SpikeDrivenTransformer, x: Tensor, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Each layer with its median times in ms, and those of the whole call."""
    inference = SparseInference(accelerate(model, engine="sparse", training=False))
    frames = inference.frames(x)
    program = inference.network.program_for(len(frames), 1, *frames.shape[1:])[0]
    seconds, calls = [], []
    for turn in range(rounds + 3):
        started = time.perf_counter()
        inference(x)
        if turn >= 3:
            calls.append(time.perf_counter() - started)
            seconds.append([(done.seconds, *done.parts) for done in program.outcomes])
    rows = []
    for i, (names, layer, done) in enumerate(zip(program.names, program.layers, program.outcomes, strict=True)):
        whole, *parts = (1e3 * statistics.median(column) for column in zip(*(turn[i] for turn in seconds), strict=True))
        parts = [part / torch.get_num_threads() for part in parts]
        inputs = layer.T * layer.N * layer.H * layer.W * layer.C
        rate = program.outcomes[layer.source].spikes / inputs if layer.source >= 0 else None
        rows.append(
            {
                "layer": " ".join(names),
                "kind": KINDS[layer.kind],
                "ms": whole,
                "rate": rate,
                "additions": done.additions,
            }
            | dict(zip(PARTS, parts, strict=True))
        )
    return rows, 1e3 * statistics.median(calls)


def report(rows: list[dict[str, Any]], call: float) -> dict[str, float]:
    """Print both tables; returns kind of work -> its share of the call."""
    print_table(
        ["layer", "ms", "share", "inputs that fire", "million additions", *PARTS],
        [
            [row["layer"].replace("patch_embed.", ""), f"{row['ms']:.3f}", f"{row['ms'] / call:.1%}",
             "" if row["rate"] is None else f"{row['rate']:.1%}", f"{row['additions'] / 1e6:.1f}",
             *(f"{row[part]:.3f}" if row["kind"] == "convolution" else "" for part in PARTS)]
            for row in rows
        ],
    )  # fmt: skip
    spent = dict.fromkeys([*PARTS, "image", "pooling", "attention", "mean", "waiting"], 0.0)
    for row in rows:
        if row["kind"] != "convolution":
            spent[row["kind"]] += row["ms"]
            continue
        for part in PARTS:
            spent[part] += row[part]
        spent["waiting"] += row["ms"] - sum(row[part] for part in PARTS)
    spent["outside"] = call - sum(row["ms"] for row in rows)
    shares = {kind: value / call for kind, value in spent.items()}
    print_table(["ms", *shares], [[f"{call:.2f}", *(f"{share:.0%}" for share in shares.values())]])
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a trained network that this project saved, with its settings inside")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 512], help="embed_dims of the networks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    profiled_kernels()
    model, x = trained(args.checkpoint, max(args.batches))
    results: dict[str, Any] = {}
    for name, net in networks(model, x, args.dims, [1.0]).items():
        for batch in args.batches:
            print(f"\n{name}, batch {batch}:")
            rows, call = shares_of(net, x[:batch], args.rounds)
            results[f"{name}, batch {batch}"] = {"ms": call, "layers": rows, "shares": report(rows, call)}
    print_json("benchmarks.sparse_shares", results, CPU, None)


if __name__ == "__main__":
    main()
