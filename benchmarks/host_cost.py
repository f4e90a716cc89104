"""What the host does per neuron, layer and step on CUDA, measured without a device: launches do nothing.

    python -m benchmarks.host_cost

The model runs on small CPU tensors as it does on CUDA, except that Triton's kernels are not launched. What remains is
Python and torch's dispatch (and small convolutions, in the whole step), the time by which the host bounds small models.
Given as multiples of `x * 1` forward and backward, measured in turns with it. CUDA graphs (`cuda_graph`) leave none of
it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.fake_cuda import accelerated
from benchmarks.measure import Spread, interleave, print_json, print_table
from module.kernels import (
    fusion,
    triton_attention,
    triton_common,
    triton_device,
    triton_lif,
    triton_norm,
    triton_norm_lif,
    triton_pool,
)

_LAUNCHING = (triton_common, triton_lif, triton_norm, triton_norm_lif, triton_pool, triton_attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=20, help="calls per round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    launches: list[object] = []

    def launch(kernel: object, *_: Any, **__: Any) -> None:
        launches.append(kernel)

    for module in _LAUNCHING:
        vars(module)["launch"] = launch
    triton_device.runs = lambda x: True
    triton_device.why_not = lambda device: None
    calls = _calls()
    counts = {}
    for name, call in calls.items():
        call()
        launches.clear()
        call()
        counts[name] = len(launches)
    # The time of this process alone: others may use the machine.
    seconds = interleave(calls, rounds=given.rounds, repeats=given.repeats, clock=time.process_time)
    base = seconds["x * 1"]
    rows, results = [], {}
    for name, values in seconds.items():
        ratio = Spread.of([value / unit for value, unit in zip(values, base, strict=True)])
        rows.append([name, f"{Spread.of(values).median * 1e6:.0f}", str(ratio), str(counts[name])])
        results[name] = {"us": Spread.of(values).median * 1e6, "ratio": ratio.median, "launches": counts[name]}
    print_table(["forward and backward", "us", "x * 1", "Triton launches"], rows, seconds.failed)
    print_json("benchmarks.host_cost", results, failed=seconds.failed)


def _calls() -> dict[str, Callable[[], object]]:
    sizes: dict[str, Any] = dict(img_size=16, embed_dims=64, depths=2, pooling_stat="0011", num_classes=10)
    model: Any = accelerated(**sizes).train().to(memory_format=torch.channels_last)
    mlp, attn = model.block[0].mlp, model.block[0].attn
    narrow, wide = (torch.randn(4, 2, 4, 4, c).permute(0, 1, 4, 2, 3).requires_grad_() for c in (64, 256))
    images = torch.randn(2, 3, 16, 16)
    return {
        "x * 1": lambda: (narrow * 1).backward(narrow.detach()),
        "neuron": lambda: mlp.fc1_lif(narrow).backward(narrow.detach()),
        "BatchNorm and neuron": lambda: fusion.norm_neuron(mlp.fc1_bn, mlp.fc2_lif, wide).backward(wide.detach()),
        "attention": lambda: attn(narrow).backward(narrow.detach()),
        "whole step, 2 blocks": lambda: model(images)[0].sum().backward(),
    }


if __name__ == "__main__":
    main()
