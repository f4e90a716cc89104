"""The multi-step neuron alone: forward, and forward with backward, for every backend that runs here.

    python -m benchmarks.neuron --shape 4 16 256 32 32 --dtype float32

The baseline is SpikingJelly's neuron (`torch`; on CUDA there is also its `cupy`). GB/s counts the input read and
the spikes written once (forward), and input and gradient read and gradient written once (backward): the least a
kernel can do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import Spread, interleave, print_json, print_table, speedup
from module.neuron import BACKENDS, make_neuron


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

    backends = []
    for backend in BACKENDS[1:]:
        try:
            make_neuron(args.mode, backend=backend).to(device)(x[:, :1])
            backends.append(backend)
        except ValueError as error:
            print(f"left out: {error}")
    results: dict[str, Any] = {}
    rows = []
    for what, passes in (("forward", 2), ("forward and backward", 5)):
        make = forward if what == "forward" else forward_backward
        calls = {b: make(make_neuron(args.mode, backend=b).to(device), x, g) for b in backends}
        seconds = interleave(calls, rounds=args.rounds, device=device)
        for backend in backends:
            time, gain = Spread.of(seconds[backend]), speedup(seconds, "torch", backend)
            rate = passes * x.numel() * x.element_size() / time.median / 1e9
            results[f"{backend} {what}"] = {"ms": time.median * 1e3, "speedup": gain.median, "gb_per_second": rate}
            rows.append([backend, what, f"{time.median * 1e3:.2f}", f"{gain.median:.1f}x", f"{rate:.1f}"])
    print_table(["backend", "work", "ms", "speed-up", "GB/s"], rows)
    print_json("benchmarks.neuron", results, device)


def forward(neuron: torch.nn.Module, x: torch.Tensor, g: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return neuron(x)

    return call


def forward_backward(neuron: torch.nn.Module, x: torch.Tensor, g: torch.Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()

    def call() -> object:
        leaf.grad = None
        neuron(leaf).backward(g)
        return leaf.grad

    return call


if __name__ == "__main__":
    main()
