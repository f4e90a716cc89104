"""One sparse convolution against the dense one, by the firing rate of its input; and the picture of it.

python -m benchmarks.sparse_layer --threads 2 --picture imgs/sparse_engine.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import Call, interleave, print_json, print_table, speedup
from module.sparse.crossover import crossover
from module.sparse.ops import sparse_conv2d

RATES = [0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
# pJ per 32-bit multiply-accumulate and accumulate at 45 nm, as in the paper.
MAC, AC = 4.6, 0.9


def curves_of(rounds: int, failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Per layer its speed-up over the dense convolution at each of RATES, and the crossover in use."""
    curves: dict[str, dict[str, Any]] = {}
    shapes = {
        "3x3, 256 to 512 channels, 16 x 16": (16, 256, 512, 16, 3),
        "1x1, 512 to 2048 channels, 8 x 8": (64, 512, 2048, 8, 1),
    }
    for title, (N, C, M, side, k) in shapes.items():
        weight = torch.randn(M, C, k, k).contiguous(memory_format=torch.channels_last)
        measured = []
        for rate in RATES:
            x = (torch.rand(N, C, side, side) < rate).float().contiguous(memory_format=torch.channels_last)
            calls: dict[str, Call] = {
                "dense": lambda x=x, weight=weight, k=k: F.conv2d(x, weight, padding=k // 2),  # type: ignore[misc]
                "sparse": lambda x=x, weight=weight: sparse_conv2d(x, weight, auto=False),  # type: ignore[misc]
            }
            with torch.no_grad():
                seconds = interleave(calls, rounds=rounds)
            failed |= {f"{name}, {title}, rate {rate:g}": reason for name, reason in seconds.failed.items()}
            measured.append(speedup(seconds, "dense", "sparse").median)
        curves[title] = {"speedup": measured, "crossover": crossover(C, M, k, N * side * side)}
    print_table(
        ["firing rate", *curves],
        [[f"{rate:g}", *(f"{c['speedup'][i]:.2f}" for c in curves.values())] for i, rate in enumerate(RATES)],
        failed,
    )
    return curves


def draw(curves: dict[str, dict[str, Any]], target: Path) -> None:
    """Speed-up by firing rate, its crossover, and the ratio of energies that theory gives."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    theory = [rate for rate in RATES if rate > 0]
    axes.plot(
        theory, [MAC / (AC * rate) for rate in theory], ":", color="#777777", label="energy, theory: 4.6 / (0.9 r)"
    )
    axes.plot(theory, [1 / rate for rate in theory], "--", color="#777777", label="operations: 1 / r")
    for (title, curve), colour in zip(curves.items(), ("#0072B2", "#D55E00"), strict=True):
        axes.plot(RATES, curve["speedup"], "o-", color=colour, markersize=4, label=f"time, measured: {title}")
        axes.axvline(curve["crossover"], color=colour, linewidth=0.8, alpha=0.6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set(xlabel="firing rate r of the layer's input", ylabel="dense / sparse", xlim=(0, 1), ylim=(0.3, 150))
    threads = torch.get_num_threads()
    what = f"{threads} CPU thread{'s' * (threads > 1)}"
    axes.set_title(f"One layer, float32, {what}; upright lines: crossover in use")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", type=Path, help="draw the curves into this PNG")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    failed: dict[str, str] = {}
    curves = curves_of(options.rounds, failed)
    if options.picture is not None:
        draw(curves, options.picture)
    print_json("benchmarks.sparse_layer", {"rates": RATES, "curves": curves}, failed=failed)


if __name__ == "__main__":
    main()
