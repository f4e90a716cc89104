"""What measuring costs: evaluation with and without the counters of firing_num.py.

`python -m benchmarks.measuring_cost`            digits model (1-64 at 16 x 16) and CIFAR's 2-256 at 32 x 32
`python -m benchmarks.measuring_cost --rounds 5` quicker

Candidates, interleaved: `forward` (forward passes only), `firing` (spikes of every named tensor), `formula` (that, and
the firing rate of every layer's input), `exact` (that, and the operations really needed). Rows are time over
`forward`'s in the same round: 1.25 means a quarter more. The aim is below 1.5 for `formula`. The model is accelerated
as `firing_num.py` does it.
"""

from __future__ import annotations

import argparse
import contextlib

import torch

from benchmarks.measure import Call, Spread, interleave, print_json, print_table, speedup
from model import sdt
from module.accelerate import accelerate
from utils.measure.family import family_of
from utils.measure.firing import FiringRecorder
from utils.measure.synapses import SynapseRecorder

MODELS = {
    "1-64 at 16 x 16, batch 120": (
        dict(img_size_h=16, img_size_w=16, in_channels=1, num_classes=10, embed_dims=64, depths=1, pooling_stat="0011"),
        120,
    ),
    "2-256 at 32 x 32, batch 16": (
        dict(img_size_h=32, img_size_w=32, num_classes=10, embed_dims=256, depths=2, pooling_stat="0011"),
        16,
    ),
}


def candidates(sizes: dict, batch: int, device: torch.device) -> dict[str, Call]:
    torch.manual_seed(0)
    model = accelerate(sdt(**sizes).to(device).eval(), training=False)
    for parameter in model.parameters():  # weights that make the layers fire, as trained ones do
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    height, width = sizes["img_size_h"], sizes["img_size_w"]
    x = torch.randn(batch, model.in_channels, height, width, device=device)
    family = family_of(model, height, width)
    assert family is not None

    def call(*, firing: bool, synapses: bool, exact: bool = False) -> Call:
        def run() -> None:
            with contextlib.ExitStack() as stack, torch.no_grad():
                if firing:
                    stack.enter_context(FiringRecorder(model.spike_sources()))
                if synapses:
                    stack.enter_context(SynapseRecorder(model, exact=exact, sums=family.sums))
                model(x)

        return run

    return {
        "forward": call(firing=False, synapses=False),
        "firing": call(firing=True, synapses=False),
        "formula": call(firing=True, synapses=True),
        "exact": call(firing=True, synapses=True, exact=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    results: dict[str, dict[str, float]] = {}
    rows = []
    failed: dict[str, str] = {}
    counted = ("firing", "formula", "exact")
    for name, (sizes, batch) in MODELS.items():
        seconds = interleave(candidates(sizes, batch, device), rounds=arguments.rounds, device=device)
        failed |= {f"{name}, {candidate}": reason for candidate, reason in seconds.failed.items()}
        ratios = {candidate: speedup(seconds, candidate, "forward") for candidate in counted}
        results[name] = {candidate: ratio.median for candidate, ratio in ratios.items()}
        alone = f"{1e3 * Spread.of(seconds['forward']).median:.1f} ms" if "forward" in seconds else ""
        rows.append([name, alone, *(str(ratio) for ratio in ratios.values())])
    print_table(["model", "forward", *(f"{candidate} / forward" for candidate in counted)], rows, failed)
    print_json("benchmarks.measuring_cost", results, device, failed)


if __name__ == "__main__":
    main()
