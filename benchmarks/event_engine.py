"""The event-driven engine against the plain, dense computation: whole networks, memory, and one layer by firing rate.

    python -m benchmarks.event_engine --only evaluation training memory --threads 2
    python -m benchmarks.event_engine --only evaluation --checkpoint output/train/demo/model_best.pth.tar \
        --config conf/digits/1_64_15E_t4.yml
    python -m benchmarks.event_engine --only layer --picture imgs/event_engine.png

With --cpu-time each candidate runs on one thread and its processor time counts: a fair ratio also while others use
the machine, which stretches wall-clock times and not these.

plain        the published computation: SpikingJelly's neurons, contiguous tensors, float32
plain bf16   the same under bfloat16 autocast
layers       engine: event, the model's own layers around event-driven convolutions
bits         evaluation from spikes to spikes (module.event_inference), BatchNorm folded
bf16 grad    layers, with input gradients in bfloat16

Without a checkpoint the network is CIFAR 2-512 with random weights (B = 16, T = 4). Its BatchNorm statistics are set
from one batch: with the initial ones next to nothing fires, and the engine would look better than it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import PeakMemory, in_child, interleave, print_json, print_table, speedup
from benchmarks.plain import PlainSDT
from model import SpikeDrivenTransformer
from module.event_crossover import crossover
from module.event_inference import EventInference
from module.event_layers import EventConv2d, use_engine
from module.event_ops import event_conv2d

CIFAR = dict(img_size_h=32, img_size_w=32, num_classes=10, embed_dims=512, depths=2, pooling_stat="0011")
BATCH = 16
FIRST = ("patch_embed.proj_conv",)
# pJ per 32-bit multiply-accumulate and accumulate at 45 nm, as in the paper.
MAC, AC = 4.6, 0.9
Call = Callable[[], object]


_cpu_time = False


def timed(candidates: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate by round: of the clock, or of the processor."""
    if not _cpu_time:
        return interleave(candidates, rounds=rounds)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, call in candidates.items():
            started = time.process_time()
            call()
            if turn:  # the first round warms up
                seconds[name].append(time.process_time() - started)
    return seconds


def random_network(**options: Any) -> tuple[PlainSDT, Tensor]:
    """CIFAR 2-512 whose BatchNorms are normalised by the batch that comes with it."""
    torch.manual_seed(0)
    model = PlainSDT(**(CIFAR | options)).train()
    x = torch.randn(BATCH, 3, 32, 32)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
        model(x)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval(), x


def trained_network(config: str, checkpoint: str) -> tuple[PlainSDT, Tensor]:
    """The network of a checkpoint, and the first batch of its evaluation split."""
    from utils.build import model_arguments
    from utils.checkpoint import load_weights
    from utils.config import parse_config
    from utils.loaders import build_eval_loader

    cfg = parse_config(["-c", config], prog="event_engine", description="")
    arguments = model_arguments(cfg) | {"embed_dims": cfg.dim, "depths": cfg.layer, "num_heads": cfg.num_heads}
    model = PlainSDT(**arguments)
    load_weights(model, checkpoint)
    loader = build_eval_loader(cfg, device=torch.device("cpu"), rank=0, world_size=1)
    return model.eval(), next(iter(loader))[0]


def as_model(plain: PlainSDT, engine: str, *, bf16_input_grad: bool = False) -> SpikeDrivenTransformer:
    """The same weights in this project's model, with its fastest neurons."""
    model = copy.deepcopy(plain)
    model.__class__ = SpikeDrivenTransformer  # type: ignore[assignment]  # only the forward pass differs
    for module in model.modules():
        if hasattr(module, "backend_choice"):
            module.backend_choice = "auto"  # type: ignore[assignment]
    model.to(memory_format=torch.channels_last)
    reason = use_engine(model, engine, skip=FIRST, bf16_input_grad=bf16_input_grad)
    assert reason is None, reason
    return model


def entering_rates(model: SpikeDrivenTransformer, x: Tensor) -> dict[str, float]:
    """Firing rate of what enters each event-driven layer."""
    rates: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: rates.update({name: float((inputs[0] != 0).float().mean())})

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if isinstance(m, EventConv2d)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return rates


def evaluation(plain: PlainSDT, x: Tensor, rounds: int) -> dict[str, Any]:
    layered = as_model(plain, "event").eval()
    bits = EventInference(plain, auto=False)
    channels_last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def bf16() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(x)

    candidates: dict[str, Call] = {
        "plain": lambda: plain(x),
        "plain bf16": bf16,
        "layers": lambda: layered(channels_last),
        "bits": lambda: bits(x),
    }
    with torch.no_grad():
        expected = plain(x)[0]
        error = float((bits(x)[0] - expected).abs().max() / expected.abs().max())
        seconds = timed(candidates, rounds)
    return _report("evaluation", seconds, len(x)) | {
        "relative_difference_of_logits": error,
        "entering_rates": entering_rates(layered, channels_last),
    }


def training_step(name: str) -> Call:
    """One step of the random network: forward, cross entropy, backward, AdamW."""
    plain, x = random_network()
    y = torch.arange(len(x)) % 10
    model: nn.Module = plain
    if name not in ("plain", "plain bf16"):
        model = as_model(plain, "event", bf16_input_grad=name == "bf16 grad")
        x = x.contiguous(memory_format=torch.channels_last)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    amp = name.endswith("bf16")

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x)[0].float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


TRAINING = ("plain", "plain bf16", "layers", "bf16 grad", "layers bf16")


def training(rounds: int) -> dict[str, Any]:
    seconds = timed({name: training_step(name) for name in TRAINING}, rounds)
    return _report("training step", seconds, BATCH)


def memory() -> dict[str, Any]:
    """Peak memory of two training steps beyond model and libraries, each candidate in a process of its own."""
    threads = str(torch.get_num_threads())
    peaks = {
        name: in_child("benchmarks.event_engine", ["--child", name, "--threads", threads])["mib"] for name in TRAINING
    }
    rows = [[name, f"{mib:.0f}", f"{mib / peaks['plain']:.2f}"] for name, mib in peaks.items()]
    print_table(["peak training memory", "MiB", "of plain"], rows)
    return {"mib": peaks}


def child(name: str) -> None:
    """Measure one candidate's memory and print it."""
    step = training_step(name)
    # From before the first step: memory that it frees stays with the process and would hide what the next one takes.
    with PeakMemory(torch.device("cpu")) as use:
        step()
        step()
    print(json.dumps({"mib": use.peak - use.before}))


def _report(what: str, seconds: dict[str, list[float]], images: int) -> dict[str, Any]:
    ratios = {name: speedup(seconds, "plain", name) for name in seconds}
    rows = [
        [name, f"{1000 * sorted(values)[len(values) // 2]:.0f}", f"{images / min(values):.0f}", str(ratios[name])]
        for name, values in seconds.items()
    ]
    print_table([what, "ms (median)", "images/s (best)", "times plain [quartiles]"], rows)
    return {"seconds": seconds, "speedup": {name: ratio.median for name, ratio in ratios.items()}}


def layer(rounds: int, picture: Path | None) -> dict[str, Any]:
    """One layer's speed-up over the dense convolution, by firing rate."""
    rates = [0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    curves: dict[str, dict[str, Any]] = {}
    shapes = {
        "3x3, 256 to 512 channels, 16 x 16": (16, 256, 512, 16, 3),
        "1x1, 512 to 2048 channels, 8 x 8": (64, 512, 2048, 8, 1),
    }
    for title, (N, C, M, side, k) in shapes.items():
        weight = torch.randn(M, C, k, k).contiguous(memory_format=torch.channels_last)
        measured = []
        for rate in rates:
            x = (torch.rand(N, C, side, side) < rate).float().contiguous(memory_format=torch.channels_last)
            calls: dict[str, Call] = {
                "dense": lambda x=x, weight=weight, k=k: F.conv2d(x, weight, padding=k // 2),  # type: ignore[misc]
                "event": lambda x=x, weight=weight: event_conv2d(x, weight, auto=False),  # type: ignore[misc]
            }
            with torch.no_grad():
                measured.append(speedup(timed(calls, rounds), "dense", "event").median)
        curves[title] = {"speedup": measured, "crossover": crossover(C, M, k, N * side * side)}
    print_table(
        ["firing rate", *curves],
        [[f"{rate:g}", *(f"{c['speedup'][i]:.2f}" for c in curves.values())] for i, rate in enumerate(rates)],
    )
    if picture is not None:
        draw(rates, curves, picture)
    return {"rates": rates, "curves": curves}


def draw(rates: list[float], curves: dict[str, dict[str, Any]], target: Path) -> None:
    """Speed-up by firing rate, its crossover, and the ratio of energies that theory gives."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    theory = [rate for rate in rates if rate > 0]
    axes.plot(
        theory, [MAC / (AC * rate) for rate in theory], ":", color="#777777", label="energy, theory: 4.6 / (0.9 r)"
    )
    axes.plot(theory, [1 / rate for rate in theory], "--", color="#777777", label="operations: 1 / r")
    for (title, curve), colour in zip(curves.items(), ("#0072B2", "#D55E00"), strict=True):
        axes.plot(rates, curve["speedup"], "o-", color=colour, markersize=4, label=f"time, measured: {title}")
        axes.axvline(curve["crossover"], color=colour, linewidth=0.8, alpha=0.6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set(xlabel="firing rate r of the layer's input", ylabel="dense / event-driven", xlim=(0, 1), ylim=(0.3, 150))
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
    parts = ("evaluation", "training", "memory", "layer")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time instead of the clock's")
    parser.add_argument("--checkpoint", help="evaluate a trained network instead of a random one; with --config")
    parser.add_argument("--config", help="the checkpoint's configuration")
    parser.add_argument("--picture", type=Path, help="draw the layer's curves into this PNG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    global _cpu_time
    _cpu_time = options.cpu_time
    torch.set_num_threads(1 if _cpu_time else options.threads)
    if options.child:
        return child(options.child)
    results: dict[str, Any] = {}
    if "evaluation" in options.only:
        trained = bool(options.checkpoint and options.config)
        network = trained_network(options.config, options.checkpoint) if trained else random_network()
        results["evaluation"] = evaluation(*network, options.rounds)
    if "training" in options.only:
        results["training"] = training(options.rounds)
    if "memory" in options.only:
        results["memory"] = memory()
    if "layer" in options.only:
        results["layer"] = layer(options.rounds, options.picture)
    print_json("event_engine", results)
    return None


if __name__ == "__main__":
    main()
