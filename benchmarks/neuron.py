"""The multi-step neuron alone: forward, and forward with backward, for every backend that runs here.

    python -m benchmarks.neuron --shape 4 16 256 32 32 --dtype float32

The baseline, `spikingjelly`, is SpikingJelly's neuron itself on its torch code, `torch` the one of module/neuron.py as
it is written; the others are what `neuron_backend` chooses. GB/s counts the input read and the spikes written once
(forward), and input and gradient read and gradient written once (backward): the least a kernel can do.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.measure import Call, Spread, interleave, on_first_call, print_json, print_table, speedup
from module.accelerate import accelerate, rows
from module.kernels.backends import BACKENDS
from module.kernels.substitute import Substitute
from module.neuron import make_neuron

BASELINE = "spikingjelly"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[4, 16, 256, 32, 32], help="T B C H W")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--mode", choices=("lif", "plif"), default="lif")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    x = torch.randn(args.shape, device=device).to(getattr(torch, args.dtype))
    g = torch.randn_like(x)
    results: dict[str, Any] = {}
    table = []
    failed: dict[str, str] = {}
    for what, make, passes in (("forward", forward, 2), ("forward and backward", forward_backward, 5)):
        calls = {
            name: on_first_call(functools.partial(make, args.mode, name, x, g))
            for name in (BASELINE, *BACKENDS[1:])
            if name not in failed
        }
        seconds = interleave(calls, rounds=args.rounds, device=device)
        failed |= seconds.failed
        for name in seconds:
            time, gain = Spread.of(seconds[name]), speedup(seconds, BASELINE, name)
            rate = passes * x.numel() * x.element_size() / time.median / 1e9
            results[f"{name} {what}"] = {"ms": time.median * 1e3, "speedup": gain.median, "gb_per_second": rate}
            table.append([name, what, f"{time.median * 1e3:.2f}", f"{gain.median:.1f}x", f"{rate:.1f}"])
    print_table(["backend", "work", "ms", "speed-up", "GB/s"], table, failed)
    print_json("benchmarks.neuron", results, device, failed)


def neuron(mode: str, backend: str, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer of neurons for inputs like `x`. Raises ValueError or RuntimeError where the backend cannot run."""
    if backend == BASELINE:
        return plain.neuron(mode)
    layer = make_neuron(mode)
    # A LIF neuron has no parameter, which would tell the device.
    holder = nn.ParameterDict({"device": torch.zeros(1)})
    holder.add_module("neuron", layer)
    accelerate(holder.to(x.device), kernels="plain", neuron_backend=backend, amp_dtype=x.dtype)
    if backend != "torch" and not isinstance(layer, Substitute):
        raise RuntimeError("; ".join(row.why_not_faster for row in rows(holder)))
    return layer


def forward(mode: str, backend: str, x: Tensor, g: Tensor) -> Call:
    run = neuron(mode, backend, x)

    @torch.no_grad()
    def call() -> object:
        return run(x)

    return call


def forward_backward(mode: str, backend: str, x: Tensor, g: Tensor) -> Call:
    run = neuron(mode, backend, x)
    leaf = x.clone().requires_grad_()

    def call() -> object:
        leaf.grad = None
        run(leaf).backward(g)
        return leaf.grad

    return call


if __name__ == "__main__":
    main()
