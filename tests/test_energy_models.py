"""Models of energy on both sides: small networks by hand, equations, break-even rates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_synapses import Multi, tiny_sdt

from utils.measure.energy import account
from utils.measure.hardware import Hardware, read_hardware
from utils.measure.models.price import MODELS
from utils.measure.models.totals import model_totals
from utils.measure.models.workload import (
    Layer,
    Neurons,
    Norm,
    Product,
    Sum,
    Twin,
    Workload,
    quantised_bits,
    workload,
)
from utils.measure.sdt.ann_twin import ann_macs, attention_products, compare
from utils.measure.sdt.family import SdtFamily
from utils.measure.sdt.names import token_sums
from utils.measure.sdt.shape import SdtShape
from utils.measure.synapses import SynapseRecorder

FP32 = read_hardware("fp32")
# Round prices, so that totals can be added up by hand; an access costs the number of words plus one.
ROUND = Hardware("round", "none", replace(FP32.cost, mac=10.0, ac=1.0), memory_pj_per_byte=1.0, sram_pj=1.0,
                 sram_pj_per_bit=1 / 32, fifo_words=9.0)  # fmt: skip

# T = 2: an image enters a 3x3 conv of 1 to 2 channels on 4x4 pixels once (with bias), BatchNorm and 32 neurons follow,
# of which 5 fire; the spikes enter a linear layer of 32 to 3 without bias, and 4 are added up without weights.
CONV = Layer("conv", False, 2880.0, 1, 288, 16, 32, 20, True, 16.0, 18, 18, is_linear=False)
LINEAR = Layer("linear", True, 15.0, 2, 96, 32, 3, 96, False, 5.0, 3, 3, is_linear=True)
WORK = Workload(2, [CONV, LINEAR], [Sum("sum", 4.0, 2, 8, 4.0)], [Neurons("lif", 32, 5.0, True)], [Norm(32, 2)])
TWIN = Twin([CONV, LINEAR], [Product("f", 100, inputs=6, operands=4, outputs=2), Product("softmax", 7,
            elementwise=True)], [Norm(32, 2)])  # fmt: skip


def access(words):
    return 1 + words


def test_compute_prices_operations_alone():
    model = MODELS["compute"]
    assert model.snn(WORK, ROUND) == {"operations": 2880 + 15 + 4}
    assert model.ann(TWIN, ROUND) == {"operations": 10 * (288 + 96 + 100 + 7)}
    # 3 bits: 3 additions instead of a product, except for the image and for softmax
    assert model.ann(replace(TWIN, bits=3), ROUND) == {"operations": 10 * (288 + 7) + 3 * (96 + 100)}
    assert model.ann(replace(TWIN, bits=12), ROUND) == model.ann(TWIN, ROUND)  # never more than a product


def test_flat_moves_everything_once_per_layer_and_step():
    assert MODELS["flat"].snn(WORK, ROUND) == {
        "operations": 2899,
        "weights": 4 * (20 + 2 * 96),
        "activations": 4 * (16 + 32) + 2 * (32 / 8 + 4 * 3) + 2 * 8 / 8,
        "state": 2 * 2 * 4 * 32,
    }
    assert MODELS["flat"].ann(TWIN, ROUND) == {
        "operations": 4910,
        "weights": 4 * (20 + 96),
        "activations": 4 * (16 + 32 + 32 + 3 + 6 + 2),
    }
    quantised = MODELS["flat"].ann(replace(TWIN, bits=2), ROUND)
    assert quantised["weights"] == 4 * (20 + 96)
    assert quantised["activations"] == 4 * 16 + (32 + 32 + 3 + 6 + 2) / 4


def test_lemaire_prices_addresses_and_each_access_by_the_size_of_the_memory():
    # conv, as in an ANN: products and a bias per output; inputs, weights (and bias) and outputs; addresses
    operations = 288 * 10 + 32
    io = 288 * access(16) + 32 * access(32)
    weights = 288 * access(20) + 32 * access(20)
    addressing = 16 + 32 + 18
    # linear, by 5 spikes x 3 outputs: potentials are read and written
    operations += 5 * 3
    addressing += 5 * 3
    weights += 15 * access(96)
    io += 5 * access(9)
    potentials = 2 * 15 * access(3)
    # the sum of 4 spikes
    operations += 4
    io += 4 * access(9)
    potentials += 2 * 4 * access(8)
    # 32 neurons at 2 steps: leak; reset and queue for 5 spikes
    operations += 64 * 10 + 5
    potentials += 2 * 64 * access(32)
    io += 5 * access(9)
    # a bias from each BatchNorm output
    operations += 64
    weights += 64 * access(2)
    assert MODELS["lemaire"].snn(WORK, ROUND) == pytest.approx(
        {"operations": operations, "addressing": addressing, "weights": weights, "inputs and outputs": io,
         "potentials": potentials}, rel=1e-12)  # fmt: skip


def test_lemaire_on_the_ann_reads_an_operand_per_product():
    assert MODELS["lemaire"].ann(TWIN, ROUND) == pytest.approx(
        {
            "operations": 10 * (288 + 96 + 107) + 32 + 32,
            "addressing": 16 + 32 + 18 + 32 + 3 + 6 + 2,
            "weights": (288 + 32) * access(20) + 96 * access(96) + 100 * access(4) + 32 * access(2),
            "inputs and outputs": 288 * access(16)
            + 32 * access(32) * 2
            + 3 * access(3)
            + 6 * access(6)
            + 2 * access(2),
        },
        rel=1e-12,
    )
    narrow = MODELS["lemaire"].ann(replace(TWIN, bits=8), ROUND)
    assert narrow["inputs and outputs"] == pytest.approx(
        288 * access(16) + 32 * access(8) * 2 + 3 * access(3 / 4) + 6 * access(6 / 4) + 2 * access(2 / 4), rel=1e-12
    )


def test_a_spike_reaches_fewer_outputs_with_a_stride_but_is_addressed_by_every_tap():
    conv = replace(CONV, spiking=True, nonzero=5.0, fan_out=18, strided_fan_out=8, bias=False)
    parts = MODELS["lemaire"].snn(Workload(2, [conv], [], [], []), ROUND)
    assert parts["operations"] == 5 * 8
    assert parts["addressing"] == 5 * 18 + 2 * 5 * 10  # and two products to find the first output
    assert parts["potentials"] == 2 * 5 * 18 * access(32)


@pytest.mark.parametrize(("steps", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (15, 4), (16, 5)])
def test_bits_of_the_quantised_twin(steps, bits):
    assert quantised_bits(steps) == bits


@pytest.mark.parametrize(("steps", "ratio"), [(1, 1), (4, 4 / 3), (15, 15 / 4)])
def test_where_all_neurons_fire_a_network_costs_t_over_bits_times_its_quantised_twin(steps, ratio):
    # the dense limit of Yan et al., arXiv 2409.08290
    ones = replace(LINEAR, compute_pJ=steps * LINEAR.macs * 0.9, passes=steps)
    work = Workload(steps, [replace(CONV, compute_pJ=0.0, macs=0), ones], [], [], [])
    (total,), _ = model_totals("compute", work, [], replace(FP32, cost=replace(FP32.cost, mac=100.0)), 1.0)
    assert total.snn_pJ / total.twin_pJ(quantised=True) == pytest.approx(ratio)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_at_the_break_even_rate_both_cost_the_same(model):
    (total,), _ = model_totals(model.name, WORK, TWIN.products, FP32, firing_rate=0.05)
    for quantised in (False, True):
        even = total.break_even(quantised)
        if even.rate is None:
            snn = total.silent if even.cheaper == "at no rate" else total.silent + (total.snn_pJ - total.silent) / 0.05
            assert (total.twin_pJ(quantised) > snn) == (even.cheaper == "at any rate")
            continue
        again = sum(model.snn(WORK.scaled(even.rate / 0.05), FP32).values())
        assert again == pytest.approx(total.twin_pJ(quantised), rel=1e-9)
        assert total.ratio(quantised, rate=even.rate) == pytest.approx(1.0, rel=1e-9)
    assert total.ratio(rate=0.05) == pytest.approx(total.ratio())


def test_nothing_to_divide_by_gives_no_ratio():
    (silent,), _ = model_totals("compute", WORK.scaled(0), None, FP32, firing_rate=0.0)
    assert (silent.ratio(), silent.break_even(), silent.twin_pJ(True)) == (None, None, None)
    empty = Workload(2, [], [], [], [])
    assert model_totals("all", empty, [], FP32, None)[0][0].as_dict()["snn_mJ"] == 0


@pytest.fixture(scope="module")
def measured():
    """A tiny network that ran on two samples: itself, its counts, its sizes."""
    model = tiny_sdt()
    with torch.no_grad(), SynapseRecorder(model, sums=token_sums(model)) as recorder:
        model(torch.randn(2, 1, 8, 8))
    return model, recorder.counts(), SdtShape.of(model, 8, 8)


@pytest.mark.parametrize("first_conv", ["once", "per_step"])
@pytest.mark.parametrize("mode", ["exact", "formula"])
def test_the_model_compute_is_the_total_of_the_report_and_of_the_twin(measured, mode, first_conv):
    model, counts, shape = measured
    report = account(counts, mode=mode, first_conv=first_conv)
    work = workload(report, counts, dict(model.named_modules()), {})
    assert [one.passes for one in work.layers] == [1 if first_conv == "once" else 3, *[3] * (len(work.layers) - 1)]
    for convention in ("printed", "paper"):
        products = SdtFamily(shape, model).twin_products(convention)
        assert products == attention_products(shape, convention)
        (total,), _ = model_totals("compute", work, products, FP32, 0.1)
        assert total.snn_pJ == pytest.approx(report.total_pJ)
        assert total.twin_pJ() == pytest.approx(4.6 * ann_macs(shape, convention))
        assert total.ratio() == pytest.approx(compare(shape, report, convention).ratio)


def test_sizes_are_read_from_the_layers(measured):
    model, counts, _ = measured
    work = workload(account(counts), counts, dict(model.named_modules()), {"head_lif": 7.0})
    layers = {one.name: one for one in work.layers}
    first, head = layers["patch_embed.proj_conv"], layers["head"]
    assert (first.spiking, first.fan_out, first.strided_fan_out, first.is_linear) == (False, 9, 9, False)
    assert (head.spiking, head.fan_out, head.is_linear, head.bias) == (True, 3, True, True)
    assert head.nonzero == sum(counts.layers[-1].nonzero) / 2
    assert all(norm.channels and norm.outputs % norm.channels == 0 for norm in work.norms)
    neurons = {one.name: one for one in work.neurons}
    assert neurons["head_lif"].spikes == 7
    assert all(one.leaky for one in work.neurons)


def test_any_network_is_priced_without_a_twin():
    model = Multi()
    with torch.no_grad(), SynapseRecorder(model.eval()) as recorder:
        model(torch.randn(6, 5, 1, 8, 8))
    counts = recorder.counts()
    totals, notes = model_totals(
        "all", workload(account(counts), counts, dict(model.named_modules()), {}), None, FP32, 0.1
    )
    assert [total.model.name for total in totals] == ["compute", "flat", "lemaire"]
    assert not notes
    assert all(total.snn_pJ > 0 and total.ratio() is None for total in totals)


def test_a_model_whose_prices_are_missing_is_left_out_with_a_note():
    bare = Hardware("bare", "none", FP32.cost)
    totals, notes = model_totals("all", WORK, TWIN.products, bare, 0.1)
    assert [total.model.name for total in totals] == ["compute"]
    assert notes == [
        "left out: energy model flat, since preset bare has no memory_pj_per_byte",
        "left out: energy model lemaire, since preset bare has no sram_pj, sram_pj_per_bit, fifo_words",
    ]
