"""The common part of the step benchmarks: options, interleaved timing, memory in child processes, table, JSON line."""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import sizes
from benchmarks.children import in_child
from benchmarks.measure import (
    Call,
    PeakMemory,
    Spread,
    flops_peak,
    interleave,
    noting_failure,
    on_first_call,
    print_json,
    print_table,
    speedup,
)
from model import sdt, sdt_v2

# Size, batch and device -> one call that does the step's work.
Build = Callable[[str, int, torch.device], Call]


def options(description: str | None, candidates: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes.NAMES, default="cifar")
    parser.add_argument("--batch", type=int, default=0, help="images per step (0: by size and device)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--candidates", nargs="+", default=list(candidates), help="the first one is the baseline")
    parser.add_argument("--no-memory", action="store_true", help="leave out the child processes that measure memory")
    parser.add_argument("--no-peak", action="store_true", help="leave out the machine's peak FLOP/s")
    parser.add_argument("--largest-batch", action="store_true", help="CUDA: also find the largest batch that fits")
    parser.add_argument("--largest-of", default="", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    return parser


def run(benchmark: str, args: argparse.Namespace, build: Callable[[str], Build], passes: int) -> None:
    """Measure every candidate, print the table and the JSON line.

    Args:
        benchmark: its module name, `benchmarks.<name>`.
        build: candidate -> its `Build`.
        passes: forward-sized passes in a step (3 with a backward pass), for the achieved FLOP/s.
    """
    device = torch.device(args.device)
    batch = args.batch or sizes.batch_size(args.size, device)
    if args.memory_of:
        print(json.dumps(_memory_of(build(args.memory_of), args.size, batch, device)))
        return
    if args.largest_of:
        print(json.dumps({"largest_batch": largest_batch(build(args.largest_of), args.size, batch, device)}))
        return
    steps = {
        name: on_first_call(functools.partial(_step_of, build, name, args.size, batch, device))
        for name in args.candidates
    }
    seconds = interleave(steps, rounds=args.rounds, device=device)
    del steps
    baseline = args.candidates[0]
    flops = passes * 2 * macs_per_image(args.size) * batch
    results: dict[str, Any] = {"size": args.size, "batch": batch, "device": device.type, "candidates": {}}
    rows = []
    memory = dict.fromkeys(args.candidates, math.nan)
    if not args.no_memory:
        for name in seconds:
            with noting_failure(seconds.failed, f"{name}, memory"):
                memory[name] = _in_child(benchmark, args, "--memory-of", name, batch)["peak_mib"]
    largest: dict[str, float] = {}
    if args.largest_batch:
        if device.type != "cuda":
            raise ValueError(f"--largest-batch: a {device.type} has no limit of its own; use --device cuda")
        for name in seconds:
            with noting_failure(seconds.failed, f"{name}, largest batch"):
                largest[name] = _in_child(benchmark, args, "--largest-of", name, batch)["largest_batch"]
    for name in seconds:
        time, gain = Spread.of(seconds[name]), speedup(seconds, baseline, name)
        share = memory[name] / memory[baseline]
        results["candidates"][name] = {
            "ms": time.median * 1e3,
            "ms_quartiles": [time.low * 1e3, time.high * 1e3],
            "speedup": gain.median,
            "speedup_quartiles": [gain.low, gain.high],
            "images_per_second": batch / time.median,
            "gflops": flops / time.median / 1e9,
            "peak_mib": memory[name],
            "memory_ratio": share,
            "largest_batch": largest.get(name, math.nan),
        }
        cells = [f"{time.median * 1e3:.1f}", f"{batch / time.median:.1f}", f"{gain.median:.2f}x"]
        spread = f"{gain.low:.2f} to {gain.high:.2f}"
        held = ["", ""] if args.no_memory else [f"{memory[name]:.0f}", f"{share:.2f}x"]
        most = [f"{largest[name]:.0f}" if name in largest else ""] if args.largest_batch else []
        rows.append([name, *cells, spread, f"{flops / time.median / 1e9:.0f}", *held, *most])
    header = ["candidate", "ms/step", "images/s", "speed-up", "quartiles", "GFLOP/s", "peak MiB", "memory"]
    header += ["largest batch"] if args.largest_batch else []
    print_table(header, rows, seconds.failed)
    if not args.no_peak:
        results["peak_gflops"] = {
            str(dtype).removeprefix("torch."): flops_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)
        }
        print(f"peak GFLOP/s of this machine: {results['peak_gflops']}")
    print_json(benchmark, results, device, seconds.failed)


def _step_of(build: Callable[[str], Build], name: str, size: str, batch: int, device: torch.device) -> Call:
    return build(name)(size, batch, device)


def _in_child(benchmark: str, args: argparse.Namespace, what: str, name: str, batch: int) -> dict[str, float]:
    child = [what, name, "--size", args.size, "--batch", str(batch), "--device", args.device]
    return {key: float(value) for key, value in in_child(benchmark, child).items()}


def largest_batch(build: Build, size: str, start: int, device: torch.device, multiple: int = 8) -> int:
    """The largest batch of which two steps fit in the device's memory, to a multiple; 0 if none does.

    Doubled from `start` until it does not fit, then halved in between.
    """

    def fits(batch: int) -> bool:
        try:
            step = build(size, batch, device)
            step()
            step()
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            # What a failed step held must not count against the next one.
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    good, bad = 0, max(start // multiple, 1)
    while fits(bad * multiple):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * multiple) else (good, middle)
    return good * multiple


def _memory_of(build: Build, size: str, batch: int, device: torch.device) -> dict[str, float]:
    """What two steps need at most: weights, optimizer and activations, without the process's libraries."""
    tiny = nn.Conv2d(8, 8, 3).to(device)  # loads what the first convolution loads
    tiny(torch.zeros(1, 8, 8, 8, device=device)).sum().backward()
    with PeakMemory(device) as memory:
        step = build(size, batch, device)
        step()
        step()
    return {"peak_mib": memory.peak - memory.before}


def macs_per_image(size: str) -> float:
    """Multiply-accumulates of all convolutions and the head for one image, all T steps."""
    with torch.device("meta"):
        model = (sdt_v2 if sizes.is_v2(size) else sdt)(
            **sizes.arguments(size), neuron=lambda **settings: nn.Identity()
        )  # neurons change no shape
    macs = 0
    layers = (nn.Conv1d, nn.Conv2d, nn.Linear)

    def count(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(module, layers)
        macs += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, layers):
            module.register_forward_hook(count)
    x = sizes.batch(size, 1, torch.device("cpu"))[0]
    with torch.no_grad():
        model.eval()(x.to("meta"))
    return macs
