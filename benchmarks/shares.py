"""What a training step spends its time on: convolutions, BatchNorm, neurons, the rest; plain and ours.

    python -m benchmarks.shares --size cifar --candidates plain:fp32 ours:fp32 ours:bf16

The own time of every operator of a profiled step (torch.profiler; on CUDA its kernels' time), sorted by the
operator's name. plain's neurons are many elementwise operators of torch, which cannot be told from the shortcuts'
additions and the attention's products: they share a column. Where BatchNorm and neuron are one operator, so is their
time. Candidates: see benchmarks/candidates.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import sizes
from benchmarks.candidates import Candidate
from benchmarks.measure import noting_failure, print_json, print_table

# The first pattern that an operator's name contains decides. An autograd node of a custom operator has the operator's
# name, with _ for ::.
KINDS = {
    "convolution": r"conv|winograd|aten::(add|badd)?b?mm_?$|event_weight_grad",
    "BatchNorm and neuron": r"sdt(::|_)(bn_lif|affine_lif)",
    "BatchNorm": r"batch_norm|sdt(::|_)(bn_add|affine_add)",
    "pooling": r"max_pool",
    "optimizer": r"(?i)adam|aten::(lerp_|addcmul_|addcdiv_|sqrt|_foreach)",
    "neuron, attention, elementwise": r"sdt(::|_)(lif|attend)|aten::(add|sub|mul|div|ge|gt|le|lt|sigmoid|where|sum|"
    r"heaviside|neg|rsub|pow|exp|stack|cat|copy_|fill_|zero_|to|_to_copy|expand|threshold|logical)|[Hh]eaviside|[Ss]igmoid",
}
REST = "rest"
STEPS = 3


def kind_of(operator: str) -> str:
    """The column of an operator's time."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operator)), REST)


def shares_of(step: Callable[[], object], device: torch.device) -> tuple[dict[str, float], float]:
    """Kind -> its share of a step's time; and the milliseconds of a step under the profiler."""
    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            step()
    spent = dict.fromkeys([*KINDS, REST], 0.0)
    for event in profiled.key_averages():
        time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[kind_of(event.key)] += time
    total = sum(spent.values())
    return {kind: time / total for kind, time in spent.items()}, total / STEPS / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes.NAMES, default="cifar")
    parser.add_argument("--batch", type=int, default=0, help="images per step (0: by size and device)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--candidates", nargs="+", default=["plain:fp32", "ours:fp32", "ours:bf16"])
    args = parser.parse_args()
    device = torch.device(args.device)
    batch = args.batch or sizes.batch_size(args.size, device)
    rows, results = [], {}
    failed: dict[str, str] = {}
    for name in args.candidates:
        with noting_failure(failed, name):
            shares, milliseconds = shares_of(Candidate(name).training_step(args.size, batch, device), device)
            rows.append([name, f"{milliseconds:.0f}", *(f"{share:.0%}" for share in shares.values())])
            results[name] = {"ms": milliseconds, "shares": shares}
    print_table(["candidate", "ms", *KINDS, REST], rows, failed)
    print_json("benchmarks.shares", {"size": args.size, "batch": batch, "candidates": results}, device, failed)


if __name__ == "__main__":
    main()
