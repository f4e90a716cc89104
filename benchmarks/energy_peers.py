"""Counts and energy of one plain network: ours against SpikingJelly 2.0.0's op_counter and NeuroBench 2.3.0.

    python -m benchmarks.energy_peers

The network is the same in all three, to the last bit: weights and inputs are multiples of powers of two, so that no
order of summation rounds. Where two tools count the same thing they must count the same integer, and the command ends
in status 1 where they do not; where their scopes differ, the table says why.

The peers are installed by pip into a folder of their own (--folder) and seen by a child process only (of --python):
they are no dependencies of this project.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.spikingjelly2 import install

PACKAGES = ("spikingjelly==2.0.0", "neurobench==2.3.0", "snntorch<1", "loguru<1", "h5py", "scipy", "packaging")
T, B = 4, 3
SIDE = 12


class Plain(nn.Module):
    """Two convolutions and a linear layer, called once per time step: `[T, B, 2, 12, 12]` to logits `[B, 10]`."""

    def __init__(self, neuron: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.lif1 = neuron()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.lif2 = neuron()
        self.fc = nn.Linear(16 * (SIDE // 2) ** 2, 10)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            if parameter.dim():
                drawn = torch.randint(-24, 40, parameter.shape, generator=generator) / 64
                # One weight in five is 0: NeuroBench does not count the operations of those.
                drawn[torch.rand(parameter.shape, generator=generator) < 0.2] = 0
                parameter.data = drawn

    def forward(self, x: Tensor) -> Tensor:
        steps = [self.fc(self.lif2(self.conv2(self.lif1(self.conv1(one)))).flatten(1)) for one in x]
        return torch.stack(steps).mean(dim=0)


def frames() -> Tensor:
    """Frames of real values, many of them 0."""
    generator = torch.Generator().manual_seed(1)
    shape = (T, B, 2, SIDE, SIDE)
    return torch.randint(-16, 48, shape, generator=generator).clamp_min(0) / 16


class Row(NamedTuple):
    """One quantity, per batch: ours, a peer's, and why they differ (empty where they must be equal)."""

    quantity: str
    ours: float
    peer: str
    theirs: float
    why: str = ""

    @property
    def wrong(self) -> bool:
        return not self.why and self.ours != self.theirs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="output/benchmarks/energy_peers")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the child; it needs torch")
    parser.add_argument("--peers", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers:
        print(json.dumps(peers()))
        return 0
    from benchmarks.children import in_child

    folder = Path(args.folder).resolve()
    install(folder, PACKAGES, args.python)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    theirs = in_child("benchmarks.energy_peers", ["--peers"], args.python, {"PYTHONPATH": path})
    rows = compare(theirs)
    print(markdown(rows))
    wrong = [row.quantity for row in rows if row.wrong]
    print(json.dumps({"benchmark": "benchmarks.energy_peers", "rows": [row._asdict() for row in rows], "wrong": wrong}))
    return 1 if wrong else 0


def markdown(rows: list[Row]) -> str:
    lines = ["| quantity, per batch | ours | peer | theirs | equal, or why not |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = "NOT EQUAL" if row.wrong else row.why or "equal"
        lines.append(f"| {row.quantity} | {row.ours:,.10g} | {row.peer} | {row.theirs:,.10g} | {verdict} |")
    return "\n".join(lines)


def compare(theirs: dict[str, Any]) -> list[Row]:
    """Our counts beside those of the peers."""
    # Not at the top: the child has another SpikingJelly, which these do not know.
    from module.neuron import sj_neuron
    from utils.measure.energy import account
    from utils.measure.firing import FiringRecorder, spike_sources
    from utils.measure.hardware import read_hardware
    from utils.measure.models import lemaire
    from utils.measure.models.price import MODELS
    from utils.measure.models.workload import workload
    from utils.measure.neurobench import NeuroBenchRecorder, Static, membrane_updates
    from utils.measure.synapses import SynapseRecorder, named_modules
    from utils.run.distributed import Process

    net, x, alone = Plain(sj_neuron.LIFNode).eval(), frames(), Process(0, 1, torch.device("cpu"))
    sources = spike_sources(net)

    def reset() -> None:
        for module in net.modules():
            if isinstance(module, sj_neuron.BaseNode):
                module.reset()

    firing, synapses, bench = FiringRecorder(sources, net), SynapseRecorder(net), NeuroBenchRecorder(net, sources)
    with torch.no_grad(), firing, synapses, bench:
        logits = net(x)
    counts = synapses.counts()
    reset()
    updates = membrane_updates(net, x)
    reset()
    metrics = bench.result(Static.of(net), counts, firing.rows(alone), alone)
    if not torch.equal(logits, torch.tensor(theirs["logits"])):
        raise RuntimeError("the networks differ: their logits are not equal")

    report = account(counts)
    work = workload(report, counts, named_modules(net), metrics.spikes)
    fp32 = read_hardware("fp32")

    def priced(mac: float = 0.0, ac: float = 0.0, access: float = 0.0) -> dict[str, float]:
        """What the model of Lemaire et al. counts, as the energy where only one thing has a price."""
        cost = replace(fp32.cost, mac=mac, ac=ac)
        parts = lemaire.snn(work, replace(fp32, cost=cost, sram_pj=access, sram_pj_per_bit=0.0))
        return {name: round(B * part) for name, part in parts.items()}

    adds, products, accesses = priced(ac=1), priced(mac=1), priced(access=1)
    flat = MODELS["flat"].snn(work, replace(fp32, memory_pj_per_byte=1.0))
    first, *spiking = counts.layers
    simple, paper, nb = theirs["simple"], theirs["lemaire"], theirs["neurobench"]
    needed = sum(sum(layer.synops or []) for layer in spiking)
    dense = T * B * first.macs_per_step
    sj, lem, nbn = "SpikingJelly", "SpikingJelly, Lemaire", "NeuroBench"
    outputs = B * sum(layer.steps * layer.outputs_per_step for layer in counts.layers)
    kernel = (B - 1) * T * net.conv1.weight[:, 0].numel()
    state = round(B * flat["state"] / 2)
    return [
        Row("additions of spikes (exact)", needed, f"{sj}, SynOpCounter", simple["synop"]),
        Row("products of the first conv, padding and zeros included", dense, f"{sj}, MACCounter", simple["mac"]),
        Row("products of the first conv that are needed (exact)", sum(first.synops or []), f"{sj}, MACCounter",
            simple["mac"], "theirs includes products with 0 and with padding"),
        Row("additions of spikes (exact)", needed, f"{sj}, ACCounter", simple["ac"],
            "theirs adds biases, the neurons' own arithmetic and the mean over time"),
        Row("bytes of weights, read once per operation", 4 * (needed + dense), f"{sj}, simple energy",
            simple["weight_read_bytes"]),
        Row("bytes of weights, read once per layer and step (flat)", round(B * flat["weights"]), f"{sj}, simple energy",
            simple["weight_read_bytes"] + simple["bias_read_bytes"],
            "ours reads each weight once per step and sample, theirs once per use"),
        Row("bytes of biases, one per output", 4 * outputs, f"{sj}, simple energy", simple["bias_read_bytes"]),
        Row("bytes of potentials read (flat)", state, f"{sj}, simple energy", simple["neuron_state_read_bytes"]),
        Row("bytes of potentials written (flat)", state, f"{sj}, simple energy", simple["neuron_state_write_bytes"]),
        Row("additions: synapses, biases, resets", adds["operations"], lem, paper["ac"]),
        Row("products: first conv, leaks", products["operations"], lem, paper["mac"]),
        Row("additions for addresses, those of the first conv's kernel once per step", adds["addressing"] - kernel, lem,
            paper["acc_addr"]),
        Row("additions for addresses", adds["addressing"], lem, paper["acc_addr"],
            "theirs walks the kernel of a real-valued layer once per call, ours once per sample"),
        Row("products for addresses", products["addressing"], lem, paper["mac_addr"]),
        Row("accesses to weights and biases", accesses["weights"], lem, paper["read_params_bytes"] / 4),
        Row("accesses to potentials", accesses["potentials"], lem,
            (paper["read_potential_bytes"] + paper["write_potential_bytes"]) / 4),
        Row("accesses to inputs and outputs", accesses["inputs and outputs"] - T * B * first.outputs_per_step, lem,
            (paper["read_in_bytes"] + paper["write_out_bytes"]) / 4),
        Row("accesses to inputs and outputs, the first conv's output included", accesses["inputs and outputs"], lem,
            (paper["read_in_bytes"] + paper["write_out_bytes"]) / 4,
            "theirs writes the output of a real-valued layer in ANNs only"),
        Row("energy, pJ", round(B * sum(lemaire.snn(work, read_hardware("int32")).values())), lem,
            round(paper["total_pj"]),
            "another price of an access: theirs joins (0, 0) and 10, 20, 100 pJ at 8 KiB, 32 KiB, 1 MiB by lines, ours "
            "is the authors' line through the last three; and the row above"),
        Row("footprint, bytes", metrics.footprint, nbn, nb["Footprint"]),
        Row("connection sparsity, of 10,000", round(1e4 * (metrics.connection_sparsity or 0)), nbn,
            round(1e4 * nb["ConnectionSparsity"])),
        Row("zeros among activations, of 10**9", round(1e9 * (metrics.activation_sparsity or 0)), nbn,
            round(1e9 * nb["ActivationSparsity"])),
        Row("effective ACs", round(B * (metrics.effective_acs or 0)), nbn, round(B * nb["Effective_ACs"])),
        Row("effective MACs", round(B * (metrics.effective_macs or 0)), nbn, round(B * nb["Effective_MACs"])),
        Row("dense operations", round(B * (metrics.dense or 0)), nbn, round(B * nb["Dense"])),
        Row("additions of spikes (exact)", needed, f"{nbn}, effective ACs", round(B * nb["Effective_ACs"]),
            "theirs leaves out weights that are 0"),
        Row("changes of membrane potentials", round(len(x) * (updates or 0)), nbn,
            round(B * nb["MembraneUpdates"])),
    ]  # fmt: skip


def peers() -> dict[str, Any]:
    """In the child: what the peers count."""
    import snntorch
    from neurobench.metrics.static import ConnectionSparsity, Footprint
    from neurobench.metrics.workload import ActivationSparsity, MembraneUpdates, SynapticOperations
    from neurobench.models import TorchModel
    from spikingjelly.activation_based import functional, neuron, op_counter

    class Leaky(snntorch.SpikingNeuron):
        """SpikingJelly's LIF (tau 2, threshold 1, hard reset to 0) as NeuroBench sees a neuron of snnTorch."""

        def __init__(self) -> None:
            nn.Module.__init__(self)  # without snnTorch's buffers, which would count as footprint
            self.init_hidden, self.output, self.mem = True, False, torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            charged = self.mem + (x - self.mem) / 2
            spikes = (charged >= 1).float()
            self.mem = charged * (1 - spikes)
            return spikes

    x = frames()
    net = Plain(lambda: neuron.LIFNode(tau=2.0, v_threshold=1.0, v_reset=0.0, step_mode="s")).eval()
    with torch.no_grad():
        logits = net(x)
    functional.reset_net(net)
    simple = op_counter.estimate_simple_energy(net, x)
    functional.reset_net(net)
    paper = op_counter.estimate_lemaire_energy(net, x)
    bench = TorchModel(Plain(Leaky))
    bench.add_activation_module(Leaky)
    bench.register_hooks()
    with torch.no_grad():
        same = torch.equal(bench(x), logits)
    if not same:
        raise RuntimeError("NeuroBench's network differs from SpikingJelly's")
    data = (x[0], torch.zeros(B))  # the number of samples is read from it
    results = {"Footprint": Footprint()(bench), "ConnectionSparsity": ConnectionSparsity()(bench)}
    results["ActivationSparsity"] = ActivationSparsity()(bench, None, data)
    results["MembraneUpdates"] = MembraneUpdates()(bench, None, data)
    results |= SynapticOperations()(bench, None, data)
    return {
        "logits": logits.tolist(),
        "simple": simple.counts,
        "lemaire": paper.counts | {"total_pj": paper.total_pj},
        "neurobench": results,
    }


if __name__ == "__main__":
    sys.exit(main())
