"""The event-driven engine against the plain, dense computation: evaluation, training steps, memory.

    python -m benchmarks.event_engine --threads 2
    python -m benchmarks.event_engine --only evaluation --checkpoint output/train/demo/model_best.pth.tar \
        --config conf/digits/1_64_15E_t4.yml

With --cpu-time each candidate runs on one thread and its processor time counts: a fair ratio also while others use
the machine, which stretches wall-clock times and not these.

plain        the published computation: SpikingJelly's neurons, contiguous tensors, float32
plain bf16   the same under bfloat16 autocast
layers       engine: event, the model's own layers around event-driven convolutions
bits         evaluation from spikes to spikes (module.sparse.inference), BatchNorm folded
bf16 grad    layers, with input gradients in bfloat16
checkpoint   the forward pass of each block is computed again in the backward pass

Without a checkpoint the network is CIFAR 2-512 with random weights (B = 16, T = 4). Its BatchNorm statistics are set
from one batch: with the initial ones next to nothing fires, and the engine would look better than it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import PeakMemory, in_child, interleave, print_json, print_table, speedup
from benchmarks.plain import PlainSDT
from model import SpikeDrivenTransformer
from module.sparse.conv import SparseConv2d, use_engine
from module.sparse.inference import SparseInference
from utils.run.allocator import keep_freed_memory

CIFAR = dict(img_size_h=32, img_size_w=32, num_classes=10, embed_dims=512, depths=2, pooling_stat="0011")
BATCH = 16
FIRST = ("patch_embed.proj_conv",)
Call = Callable[[], object]
Clock = Callable[[], float]


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
    from utils.config.parse import parse_config
    from utils.data.loaders import build_eval_loader
    from utils.run.checkpoint import load_weights
    from utils.run.models import model_arguments

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

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if isinstance(m, SparseConv2d)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return rates


def with_allocator(name: str, call: Call) -> Call:
    """`call` as train.py and firing_num.py would run it, or plain's under glibc's own way."""

    def run() -> object:
        keep_freed_memory(not name.startswith("plain"))
        return call()

    return run


def evaluation(plain: PlainSDT, x: Tensor, rounds: int, clock: Clock) -> dict[str, Any]:
    layered = as_model(plain, "event").eval()
    bits = SparseInference(plain, auto=False)
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
    candidates = {name: with_allocator(name, call) for name, call in candidates.items()}
    with torch.no_grad():
        expected = plain(x)[0]
        error = float((bits(x)[0] - expected).abs().max() / expected.abs().max())
        seconds = interleave(candidates, rounds=rounds, clock=clock)
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
        model = as_model(plain, "event", bf16_input_grad=name.startswith("bf16 grad"))
        model.set_grad_checkpointing(name.endswith("checkpoint"))
        x = x.contiguous(memory_format=torch.channels_last)
    model.train()
    # train.py's choice for ours, torch's own for plain.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=model is not plain or None)
    amp = name.endswith("bf16")

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x)[0].float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return with_allocator(name, step)


TRAINING = ("plain", "plain bf16", "layers", "layers checkpoint", "bf16 grad", "bf16 grad checkpoint", "layers bf16")


def training(rounds: int, clock: Clock) -> dict[str, Any]:
    seconds = interleave({name: training_step(name) for name in TRAINING}, rounds=rounds, clock=clock)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("evaluation", "training", "memory")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time instead of the clock's")
    parser.add_argument("--checkpoint", help="evaluate a trained network instead of a random one; with --config")
    parser.add_argument("--config", help="the checkpoint's configuration")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    if options.child:
        return child(options.child)
    results: dict[str, Any] = {}
    if "evaluation" in options.only:
        trained = bool(options.checkpoint and options.config)
        network = trained_network(options.config, options.checkpoint) if trained else random_network()
        results["evaluation"] = evaluation(*network, options.rounds, clock)
    if "training" in options.only:
        results["training"] = training(options.rounds, clock)
    if "memory" in options.only:
        results["memory"] = memory()
    print_json("event_engine", results)
    return None


if __name__ == "__main__":
    main()
