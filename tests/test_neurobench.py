"""NeuroBench's metrics: against a loop, and against the definitions on small networks."""

from __future__ import annotations

import copy

import pytest
import torch
from test_synapses import Multi, lif, tiny_sdt
from torch import nn

from utils.measure.firing import FiringRecorder, spike_sources
from utils.measure.neurobench import NeuroBenchRecorder, Static, membrane_updates
from utils.measure.synapses import SynapseRecorder, neurons_of
from utils.run.distributed import Process

ALONE = Process(0, 1, torch.device("cpu"))


def metrics(model, *batches, sources=None):
    sources = spike_sources(model) if sources is None else sources
    recorders = FiringRecorder(sources, model), SynapseRecorder(model), NeuroBenchRecorder(model, sources)
    with torch.no_grad(), recorders[0], recorders[1], recorders[2]:
        for x in batches:
            model(x)
    counts = recorders[1].counts()
    alone = SynapseRecorder(model)
    with torch.no_grad(), alone:
        for x in batches:
            model(x)
    assert counts.layers == alone.counts().layers  # counting one thing does not disturb counting another
    return recorders[2].result(Static.of(model), counts, recorders[0].rows(ALONE), ALONE)


def by_definition(model, x):
    """Effective MACs and ACs, dense operations, spikes and outputs of neurons, with layers of zeros and ones."""
    found = {"MAC": 0, "AC": 0, "dense": 0, "fired": 0, "outputs": 0}

    def layer(module, args, output):
        marked, ones = copy.deepcopy(module).double(), copy.deepcopy(module).double()
        for clone in (marked, ones):
            clone._forward_hooks.clear()
            clone.bias = None
        marked.weight.data = module.weight.ne(0).double()
        nn.init.ones_(ones.weight)
        kind = "AC" if set(args[0].unique().tolist()) <= {0, 1, -1} else "MAC"
        found[kind] += int(marked(args[0].ne(0).double()).sum())
        found["dense"] += int(ones(torch.ones_like(args[0]).double()).sum())

    def neuron(module, args, output):
        found["fired"] += int(output.count_nonzero())
        found["outputs"] += output.numel()

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [module.register_forward_hook(layer) for module in layers]
    handles += [module.register_forward_hook(neuron) for module in neurons_of(model).values()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("build", [tiny_sdt, Multi])
def test_metrics_are_those_of_the_definitions(build, pruned):
    torch.manual_seed(1)
    model = build().eval()
    if pruned:
        with torch.no_grad():
            for weight in (m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
                weight[torch.rand_like(weight) < 0.4] = 0
    x = torch.randn(3, 1, 8, 8) if build is tiny_sdt else torch.randn(4, 3, 1, 8, 8)
    expected, found = by_definition(model, x), metrics(model, x)
    assert found.effective_macs == pytest.approx(expected["MAC"] / 3, rel=1e-12)
    assert found.effective_acs == pytest.approx(expected["AC"] / 3, rel=1e-12)
    assert found.dense == pytest.approx(expected["dense"] / 3, rel=1e-12)
    assert found.activation_sparsity == pytest.approx(1 - expected["fired"] / expected["outputs"], rel=1e-12)
    assert (found.connection_sparsity > 0.3) == pruned
    assert sum(found.spikes.values()) == pytest.approx(expected["fired"] / 3, rel=1e-12)
    if build is Multi:  # batches are counted together
        again = metrics(model, x[:, :1], x[:, 1:])
        assert (again.effective_acs, again.dense) == pytest.approx((found.effective_acs, found.dense), rel=1e-12)


def test_neurons_without_a_source_of_their_own_count_too():
    model = Multi().eval()
    x = torch.randn(4, 2, 1, 8, 8)
    assert metrics(model, x, sources={}).activation_sparsity == metrics(model, x).activation_sparsity


def test_what_a_model_is_when_it_does_not_run():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    static = Static.of(model)
    assert static.parameters == 10 + 4 + 4
    assert static.footprint == 4 * (18 + 4) + 8  # running statistics, and batches counted in int64
    assert static.connection_sparsity == 4 / 12
    assert Static.of(nn.ReLU()).connection_sparsity is None


def test_membrane_updates_are_changes_after_the_first_step():
    class Net(nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.lif = lif(mode)

        def forward(self, x):
            if self.lif.step_mode == "m":
                return self.lif(x.transpose(0, 1))
            return torch.stack([self.lif(x[:, t]) for t in range(x.shape[1])])

    # tau 2, threshold 1: 0 stays 0; a current of 1 gives 0.5, then decays; a current of 3 fires and resets to 0
    x = torch.tensor([[[0.0, 1.0, 3.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]])  # [B, T, 3]
    for mode in ("m", "s"):
        net = Net(mode).train()
        assert membrane_updates(net, x) == 3 + 1 + 1  # the first step; then only the second neuron's potential
        assert net.training
    assert membrane_updates(nn.Linear(2, 2), torch.ones(1, 2)) is None


def test_neurons_that_show_no_potential_have_no_number_of_updates():
    class Foreign(nn.Module):
        v_threshold = 1.0

        def forward(self, x):
            return x.gt(1).float()

    assert membrane_updates(nn.Sequential(Foreign()), torch.ones(2, 3)) is None
