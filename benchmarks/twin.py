"""The spiking network against its ANN twin in time: one evaluation pass of each, by batch size, with firing rates.

    python -m benchmarks.twin output/train/small_2_64/model_best.pth.tar --threads 2
    python -m benchmarks.twin CHECKPOINT --dims 512 --rates 0.25 0.5 1 2 3   # at multiples of the rates

The trained network of the checkpoint runs on images of its evaluation split, evenly chosen. Networks of other widths
(--dims) have random weights and BatchNorm shifts that make each layer of neurons fire at the rate of the trained
network's (times --rates). The twin is an ANN of the same layers: benchmarks/ann.py.

plain          the published computation: SpikingJelly's neurons, contiguous tensors, float32
dense          engine: dense, BatchNorm folded, the faster kernels attached
sparse         engine: sparse, evaluated from spikes to spikes
spiking onnx   the network as it is exported, run by ONNX Runtime
twin           the ANN, float32, channels-last; also in bfloat16, under torch.compile, in 8 bits (torch.ao, onednn), and
               with ONNX Runtime in float32 and in 8 bits

All on a CPU with --threads. Candidates take turns, ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ann
from benchmarks.exported import settings_of
from benchmarks.firing_at import random_network, rates_of, set_rates
from benchmarks.measure import Call, Spread, interleave, noting_failure, print_json, print_table, speedup
from model import SpikeDrivenTransformer
from module.accelerate import accelerate, for_evaluation
from utils.data.loaders import build_eval_loader, collate
from utils.run.allocator import keep_freed_memory
from utils.run.build import build_model
from utils.run.checkpoint import load_weights
from utils.run.export_formats import Logits

CPU = torch.device("cpu")
REST = 0.05  # seconds before each turn: ONNX Runtime's threads and OpenMP's wait actively after their work


def trained(checkpoint: str, images: int) -> tuple[SpikeDrivenTransformer, Tensor]:
    """The network of a checkpoint, and that many images of its evaluation split, evenly chosen."""
    cfg = settings_of(checkpoint, batch=1)
    model: Any = build_model(cfg)
    load_weights(model, checkpoint)
    loader = build_eval_loader(cfg, device=CPU)
    data: Any = loader.batches.dataset  # type: ignore[attr-defined]
    loader.batches = [collate([data[i * len(data) // images] for i in range(images)])]
    return model.eval(), next(iter(loader))[0]


def candidates(model: SpikeDrivenTransformer, x: Tensor) -> dict[str, Callable[[], ann.Run]]:
    """Name -> makes what is called with images `[B, C, H, W]`."""

    def copied() -> SpikeDrivenTransformer:
        return copy.deepcopy(model)

    def twin(dtype: torch.dtype = torch.float32) -> nn.Module:
        return ann.ANN(copied()).eval().to(dtype).to(memory_format=torch.channels_last)

    return {
        "plain": lambda: accelerate(copied(), kernels="plain", training=False),
        "dense": lambda: accelerate(copied().fuse().to(memory_format=torch.channels_last), training=False),
        "sparse": lambda: for_evaluation(accelerate(copied(), engine="sparse", training=False)),
        "spiking onnx": lambda: ann.onnx(Logits(copied()), x),
        "twin": twin,
        "twin bfloat16": lambda: _in_bfloat16(twin(torch.bfloat16)),
        "twin compiled": lambda: torch.compile(twin()),
        "twin int8": lambda: ann.int8(ann.ANN(copied()).eval(), x),
        "twin onnx": lambda: ann.onnx(ann.ANN(copied()).eval(), x),
        "twin onnx int8": lambda: ann.onnx(ann.ANN(copied()).eval(), x, quantized=True),
    }


def _in_bfloat16(net: nn.Module) -> ann.Run:
    return lambda x: net(x.bfloat16())


def call_of(make: Callable[[], ann.Run], x: Tensor) -> Call:
    run = make()

    @torch.no_grad()
    def step() -> object:
        return run(x)

    return step


def steps_of(model: SpikeDrivenTransformer, x: Tensor, names: list[str], failed: dict[str, str]) -> dict[str, Call]:
    """Name -> one evaluation pass of the candidate, built and called once; what fails is noted."""
    contiguous, channels_last = x.contiguous(), x.contiguous(memory_format=torch.channels_last)
    makers, steps = candidates(model, contiguous), {}
    for name in names:
        with noting_failure(failed, name):
            step = call_of(makers[name], contiguous if "onnx" in name or name == "plain" else channels_last)
            step()
            steps[name] = step
    return steps


def compared(steps: dict[str, Call], failed: dict[str, str], rounds: int, repeats: int) -> dict[str, Any]:
    """Print and return the times of one network at one batch size."""
    seconds = interleave(steps, rounds=rounds, repeats=repeats, rest=REST, device=CPU)
    rows, results = [], {}
    for name in seconds:
        time, gain = Spread.of([1e3 * value for value in seconds[name]]), speedup(seconds, "twin", name)
        results[name] = {"ms": time.median, "times_twin": gain.median}
        spread = f"{time.low:.3g} to {time.high:.3g}"
        rows.append([name, f"{time.median:.3g}", spread, f"{gain.median:.2f}", f"{gain.low:.2f} to {gain.high:.2f}"])
    print_table(["candidate", "ms", "quartiles", "times the twin", "quartiles"], rows, failed | seconds.failed)
    return results


def networks(
    model: SpikeDrivenTransformer, x: Tensor, dims: list[int], factors: list[float]
) -> dict[str, SpikeDrivenTransformer]:
    """Name -> the trained network, and random ones at multiples of its rates."""
    trained_dim = model.embed_dims
    rates = rates_of(model, x)
    found: dict[str, SpikeDrivenTransformer] = {}
    for dim in dims:
        for factor in factors:
            name = f"2-{dim}" if len(factors) == 1 else f"2-{dim} at {factor:g} of the rates"
            if dim == trained_dim and factor == 1:
                found[f"{name}, trained"] = model
                continue
            net = random_network(_arguments(model) | {"embed_dims": dim}, x)
            set_rates(net, {key: min(0.95, factor * rate) for key, rate in rates.items()}, x[:4])
            found[name] = net
    return found


def _arguments(model: SpikeDrivenTransformer) -> dict[str, Any]:
    names = ("in_channels", "num_classes", "num_heads", "mlp_ratios", "depths", "T", "pooling_stat")
    return {"img_size": 32} | {name: getattr(model, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a trained network that this project saved, with its settings inside")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 512], help="embed_dims of the networks")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="multiples of the trained firing rates")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="calls in a row, so that neighbours disturb less")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--candidates", nargs="+", help="by default all; the twin is always there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    model, x = trained(args.checkpoint, max(args.batches))
    results: dict[str, Any] = {}
    prepared: list[tuple[str, int, dict[str, Call], dict[str, str]]] = []
    for name, net in networks(model, x, args.dims, args.rates).items():
        rates = rates_of(net, x)
        mean = sum(rates.values()) / len(rates)
        print(f"{name}: mean firing rate {mean:.3f} ({', '.join(f'{k} {v:.3f}' for k, v in rates.items())})")
        results[name] = {"rates": rates, "mean_rate": mean}
        names = args.candidates or list(candidates(net, x))
        names += ["twin"] if "twin" not in names else []
        for batch in args.batches:
            failed: dict[str, str] = {}
            prepared.append((name, batch, steps_of(net, x[:batch], names, failed), failed))
    for name, batch, steps, failed in prepared:
        print(f"\n{name}, batch {batch}:")
        results[name][f"batch {batch}"] = compared(steps, failed, args.rounds, args.repeats)
    print_json("benchmarks.twin", results, CPU, None)


if __name__ == "__main__":
    main()
