"""Sparse convolutions against the plain, dense computation: evaluation, training steps, memory.

    python -m benchmarks.sparse_engine --threads 2
    python -m benchmarks.sparse_engine --only evaluation --checkpoint output/train/demo/model_best.pth.tar \
        --config conf/digits/1_64_15E_t4.yml

With --cpu-time each candidate runs on one thread and its processor time counts: a fair ratio also while others use
the machine, which stretches wall-clock times and not these.

plain        the published computation: SpikingJelly's neurons, contiguous tensors, float32
plain bf16   the same under bfloat16 autocast
layers       engine: sparse, the model's own layers around sparse convolutions
bits         evaluation from spikes to spikes (module.sparse.inference), BatchNorm folded
bf16 grad    layers, with input gradients in bfloat16
checkpoint   the forward pass of each block is computed again in the backward pass

Without a checkpoint the network is CIFAR 2-512 with random weights (B = 16, T = 4; --size digits for the small one).
Its BatchNorm statistics are set from one batch: with the initial ones next to nothing fires, and sparse convolutions
would look better than they are.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import sizes
from benchmarks.children import in_child
from benchmarks.measure import (
    Call,
    PeakMemory,
    Timings,
    interleave,
    noting_failure,
    on_first_call,
    print_json,
    print_table,
    speedup,
)
from benchmarks.plain import PlainSDT
from model import SpikeDrivenTransformer, sdt
from module.accelerate import accelerate, rows
from module.sparse.conv import SparseConv2d
from module.sparse.inference import SparseInference
from utils.run.allocator import keep_freed_memory

CPU = torch.device("cpu")
Clock = Callable[[], float]


def random_network(size: str) -> tuple[PlainSDT, Tensor]:
    """A network whose BatchNorms are normalised by the batch that comes with it."""
    torch.manual_seed(0)
    model = PlainSDT(**sizes.arguments(size)).train()
    x, _ = sizes.batch(size, sizes.batch_size(size, CPU), CPU)
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

    cfg = parse_config(["-c", config], prog="sparse_engine", description="")
    arguments = model_arguments(cfg) | {"embed_dims": cfg.dim, "depths": cfg.layer, "num_heads": cfg.num_heads}
    arguments.pop("pretrained")
    model = PlainSDT(**arguments)
    load_weights(model, checkpoint)
    loader = build_eval_loader(cfg, device=CPU, rank=0, world_size=1)
    return model.eval(), next(iter(loader))[0]


def with_sparse_layers(plain: PlainSDT, *, training: bool = False, **options: Any) -> SpikeDrivenTransformer:
    """The same weights in this project's model, accelerated with sparse convolutions."""
    model = sdt(**plain.arguments)
    model.load_state_dict(plain.state_dict())
    model.to(memory_format=torch.channels_last).train(training)
    accelerate(model, engine="sparse", training=training, **options)
    if not any(isinstance(layer, SparseConv2d) for layer in model.modules()):
        raise RuntimeError("; ".join(f"{row.part}: {row.why_not_faster}" for row in rows(model)))
    return model


def input_rates(model: SpikeDrivenTransformer, x: Tensor) -> dict[str, float]:
    """Firing rate of the input of each sparse convolution."""
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


def evaluation(plain: PlainSDT, x: Tensor, rounds: int, clock: Clock, failed: dict[str, str]) -> dict[str, Any]:
    channels_last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def bf16() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(x)

    def layers() -> Call:
        model = with_sparse_layers(plain)
        return lambda: model(channels_last)

    def bits() -> Call:
        network = SparseInference(with_sparse_layers(plain))
        return lambda: network(x)

    candidates: dict[str, Call] = {
        "plain": lambda: plain(x),
        "plain bf16": bf16,
        "layers": on_first_call(layers),
        "bits": on_first_call(bits),
    }
    candidates = {name: with_allocator(name, call) for name, call in candidates.items()}
    with torch.no_grad():
        seconds = interleave(candidates, rounds=rounds, clock=clock)
        result = _report("evaluation", seconds, len(x))
        failed |= seconds.failed
        with noting_failure(failed, "rates of the inputs"):
            model = with_sparse_layers(plain)
            expected, actual = plain(x)[0], SparseInference(model)(x)[0]
            result["relative_difference_of_logits"] = float((actual - expected).abs().max() / expected.abs().max())
            result["input_rates"] = input_rates(model, channels_last)
    return result


def training_step(name: str, size: str) -> Call:
    """One step of the random network: forward, cross entropy, backward, AdamW."""
    plain, x = random_network(size)
    y = torch.arange(len(x)) % 10
    model: nn.Module = plain.train()
    amp = name.endswith("bf16")
    if not name.startswith("plain"):
        options = {"bf16_input_grad": name.startswith("bf16 grad"), "amp_dtype": torch.bfloat16 if amp else None}
        sparse = with_sparse_layers(plain, training=True, **options)
        sparse.set_grad_checkpointing(name.endswith("checkpoint"))
        model, x = sparse, x.contiguous(memory_format=torch.channels_last)
    # train.py's choice for ours, torch's own for plain.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=model is not plain or None)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x)[0].float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return with_allocator(name, step)


TRAINING = ("plain", "plain bf16", "layers", "layers checkpoint", "bf16 grad", "bf16 grad checkpoint", "layers bf16")


def training(size: str, rounds: int, clock: Clock, failed: dict[str, str]) -> dict[str, Any]:
    calls = {name: on_first_call(functools.partial(training_step, name, size)) for name in TRAINING}
    seconds = interleave(calls, rounds=rounds, clock=clock)
    failed |= seconds.failed
    return _report("training step", seconds, sizes.batch_size(size, CPU))


def memory(size: str, failed: dict[str, str]) -> dict[str, Any]:
    """Peak memory of two training steps beyond model and libraries, each candidate in a process of its own."""
    options = ["--size", size, "--threads", str(torch.get_num_threads())]
    peaks: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name in TRAINING:
        with noting_failure(problems, name):
            peaks[name] = in_child("benchmarks.sparse_engine", ["--child", name, *options])["mib"]
    baseline = peaks.get("plain", math.nan)
    table = [[name, f"{mib:.0f}", f"{mib / baseline:.2f}"] for name, mib in peaks.items()]
    print_table(["peak training memory", "MiB", "of plain"], table, problems)
    failed |= {f"{name}, memory": reason for name, reason in problems.items()}
    return {"mib": peaks}


def child(name: str, size: str) -> None:
    """Measure one candidate's memory and print it."""
    step = training_step(name, size)
    # From before the first step: memory that it frees stays with the process and would hide what the next one takes.
    with PeakMemory(CPU) as use:
        step()
        step()
    print(json.dumps({"mib": use.peak - use.before}))


def _report(what: str, seconds: Timings, images: int) -> dict[str, Any]:
    ratios = {name: speedup(seconds, "plain", name) for name in seconds}
    table = [
        [name, f"{1000 * sorted(values)[len(values) // 2]:.0f}", f"{images / min(values):.0f}", str(ratios[name])]
        for name, values in seconds.items()
    ]
    print_table([what, "ms (median)", "images/s (best)", "times plain [quartiles]"], table, seconds.failed)
    return {"seconds": seconds, "speedup": {name: ratio.median for name, ratio in ratios.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("evaluation", "training", "memory")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--size", choices=sizes.NAMES, default="cifar")
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
        return child(options.child, options.size)
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    if "evaluation" in options.only:
        trained = bool(options.checkpoint and options.config)
        network = trained_network(options.config, options.checkpoint) if trained else random_network(options.size)
        results["evaluation"] = evaluation(*network, options.rounds, clock, failed)
    if "training" in options.only:
        results["training"] = training(options.size, options.rounds, clock, failed)
    if "memory" in options.only:
        results["memory"] = memory(options.size, failed)
    print_json("benchmarks.sparse_engine", results, failed=failed)
    return None


if __name__ == "__main__":
    main()
