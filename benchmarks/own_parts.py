"""What a part of one's own costs in speed: a training step with one kind of part that has no faster way.

    python -m benchmarks.own_parts --size cifar --rounds 9

Each candidate computes the same network; in all but the first, the parts of one kind belong to a derived class, as a
researcher's would, so they run as they are written. `nothing accelerated` is the model as module/ has it.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import sizes
from benchmarks.measure import Call, Spread, interleave, on_first_call, print_json, print_table, speedup
from model import sdt
from module.accelerate import accelerate
from module.attention import MS_SSA_Conv
from module.mlp import MS_MLP_Conv
from module.neuron import LIF, register_neuron
from module.sps import MS_SPS


class OwnNeuron(LIF):
    """LIF under another name."""


class OwnAttention(MS_SSA_Conv):
    """SDSA under another name."""


class OwnMLP(MS_MLP_Conv):
    """The MLP under another name."""


class OwnSPS(MS_SPS):
    """Patch splitting under another name."""


CANDIDATES: dict[str, dict[str, Any]] = {
    "all accelerated": {},
    "own MLP": dict(mlp_layer=OwnMLP),
    "own attention": dict(attn_layer=OwnAttention),
    "own patch splitting": dict(sps_layer=OwnSPS),
    "own neuron": dict(spike_mode="own"),
    "nothing accelerated": {},
}


def step_of(name: str, size: str, batch: int) -> Call:
    """One training step: forward, backward and AdamW's update."""
    torch.manual_seed(0)
    model = sdt(**sizes.arguments(size) | CANDIDATES[name])
    if name != "nothing accelerated":
        accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, y = sizes.batch(size, batch, torch.device("cpu"))

    def step() -> None:
        F.cross_entropy(model(x)[0], y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes.NAMES, default="cifar")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="default: that of the other benchmarks")
    args = parser.parse_args()
    register_neuron("own", OwnNeuron)
    batch = args.batch or sizes.batch_size(args.size, torch.device("cpu"))
    calls = {name: on_first_call(functools.partial(step_of, name, args.size, batch)) for name in CANDIDATES}
    seconds = interleave(calls, rounds=args.rounds)
    rows, results = [], {}
    for name in seconds:
        time, ratio = Spread.of(seconds[name]), speedup(seconds, "all accelerated", name)
        results[name] = {"ms": time.median * 1e3, "speed": ratio.median}
        rows.append([name, f"{time.median * 1e3:.1f}", f"{ratio.median:.2f}"])
    print_table(["network", "ms per step", "speed"], rows, seconds.failed)
    print_json("benchmarks.own_parts", results, failed=seconds.failed)


if __name__ == "__main__":
    main()
