"""Energy: arithmetic, published figures, modes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import load_json
from test_synapses import Multi, tiny_sdt

from utils.measure.energy import COSTS, Cost, EnergyReport, EnergyRow, account, measure_energy
from utils.measure.energy_extras import extra_rows, memory_bytes
from utils.measure.firing import FiringRecorder
from utils.measure.sdt.ann_twin import ann_macs, attention_twin_pJ, compare
from utils.measure.sdt.family import SdtFamily
from utils.measure.sdt.names import token_sums
from utils.measure.sdt.paper_energy import PAPER_READING, paper_energy
from utils.measure.sdt.shape import SdtShape
from utils.measure.spike_values import Values
from utils.measure.synapse_counts import Counts, LayerCount
from utils.measure.synapses import SynapseRecorder
from utils.run.distributed import Process

MACS = load_json("macs")
GROUPS = {
    "sps.conv1": ("patch_embed.proj_conv",),
    "sps.conv2-4": tuple(f"patch_embed.proj_conv{i}" for i in (1, 2, 3)),
    "sps.rpe": ("patch_embed.rpe_conv",),
    "attn.qkv": ("attn.q_conv", "attn.k_conv", "attn.v_conv"),
    "attn.proj": ("attn.proj_conv",),
    "mlp.fc1": ("mlp.fc1_conv",),
    "mlp.fc2": ("mlp.fc2_conv",),
    "head": ("head",),
}


def shape_of(size):
    entry = MACS[size]
    return SdtShape(embed_dims=entry["embed_dims"], depths=entry["depths"], height=entry["img_size"],
                    width=entry["img_size"])  # fmt: skip


def layer(**changes):
    """A layer that 10 samples of T = 2 ran through."""
    values = dict(name="conv", type="Conv2d", samples=10, macs_per_step=1000, inputs_per_step=50,
                  outputs_per_step=20, weights=30, nonzero=[100, 150], synops=[1900, 2900])  # fmt: skip
    return LayerCount(**(values | changes))


def counts_of(*layers):
    return Counts(list(layers), [], {}, {}, 2, 10, [one.name for one in layers], [], [])


def neurons_per_step(shape):
    """Neurons that are updated in each time step, those without effect left out."""
    D, N = shape.embed_dims, shape.tokens
    patch = sum(shape._grid(i) * D // 8 * 2**i for i in range(3)) + N * D
    block = 5 * N * D + D + N * shape.hidden  # shortcut, q, k, v, fc1; channel mask; fc2
    return patch + shape.depths * block + D


@pytest.mark.parametrize("size", MACS)
def test_operations_per_layer_are_the_published_sizes(size):
    macs = shape_of(size).macs()
    for group, total in MACS[size]["macs_per_time_step"].items():
        assert sum(n for name, n in macs.items() if name.endswith(GROUPS[group]) and ("." in name or name == group)
                   and not (group == "sps.conv1" and name != GROUPS[group][0])) == total, group  # fmt: skip
    assert sum(macs.values()) == MACS[size]["total_synaptic_macs_per_time_step"]
    assert neurons_per_step(shape_of(size)) == MACS[size]["lif_neurons"]


@pytest.mark.parametrize("size", MACS)
def test_the_twin_has_the_published_energy(size):
    golden = MACS[size]["ann_twin"]
    for convention, name in (("printed", "2N2D"), ("paper", "2ND2")):
        macs = ann_macs(shape_of(size), convention)
        assert macs == golden[f"macs_with_{name}"]
        assert macs * COSTS["fp32"].mac / 1e9 == pytest.approx(golden[f"mJ_with_{name}"], rel=1e-12)


def test_self_attention_of_the_twin_is_published_for_three_sizes():
    published = {"8-384": 6.653e8, "8-512": 1.182e9, "8-768": 2.659e9}
    for size, energy in published.items():
        assert attention_twin_pJ(shape_of(size), "paper") == pytest.approx(energy, rel=5e-4)
    # 87.2 is one 8-768 block against 3.1e7 pJ (rounded); as printed it would be 61.2
    assert attention_twin_pJ(shape_of("8-768"), "paper") / 87.2 == pytest.approx(3.1e7, rel=0.02)
    printed, paper = (attention_twin_pJ(shape_of("8-768"), c) for c in ("printed", "paper"))
    assert 87.2 * printed / paper == pytest.approx(61.2, abs=0.05)


def test_a_measured_model_has_the_layers_neurons_and_residuals_of_its_sizes():
    model = tiny_sdt(img_size_h=16, img_size_w=16, mlp_ratios=1, depths=2, pooling_stat="1010")
    with torch.no_grad(), SynapseRecorder(model, sums=token_sums(model)) as recorder:
        model(torch.randn(2, 1, 16, 16))
    counts, shape = recorder.counts(), SdtShape.of(model, 16, 16)
    rates = {name: [0.5] for name in model.spike_sources()}
    assert SdtFamily(shape, model).why_not(counts, rates) == ""
    assert sum(counts.neurons_per_step.values()) == neurons_per_step(shape)
    tokens = 4 * 4 * 8
    assert shape.residual_additions_per_step() == tokens + 2 * 3 * tokens
    assert "other layers" in SdtFamily(replace(shape, depths=1), model).why_not(counts, rates)
    del rates["MS_MLP_Conv1_fc2_lif"]
    assert "MS_MLP_Conv1_fc2_lif" in SdtFamily(shape, model).why_not(counts, rates)


def test_a_total_is_the_sum_of_products_and_additions():
    # published figures of another model: 0.347330 GMAC and 6.517541 GAC are 7.4635 mJ
    operations = (("MAC", 0.347330e9), ("AC", 6.517541e9))
    rows = [EnergyRow("x", kind, n, n * COSTS["fp32"].of(kind), "") for kind, n in operations]
    report = EnergyReport("exact", "once", COSTS["fp32"], 4, rows)
    assert report.total_mJ == pytest.approx(7.4635, abs=5e-5)
    assert (report.operations("MAC"), report.operations("AC")) == (0.347330e9, 6.517541e9)


def test_a_layer_of_the_published_size_at_a_measured_rate():
    assert 4 * shape_of("8-512").macs()["patch_embed.proj_conv1"] == 3_699_376_128
    row = layer(macs_per_step=924_844_032, samples=1, inputs_per_step=100_000, nonzero=[25_831] * 4, synops=None)
    report = account(counts_of(row), mode="formula")
    assert report.rows[0].operations == pytest.approx(955.6e6, abs=0.05e6)


def test_exact_and_formula_charge_what_entered():
    counts = counts_of(layer(name="a"), layer(name="b"))
    exact, formula = account(counts), account(counts, mode="formula")
    assert exact.rows[1].operations == 480  # (1900 + 2900) / 10
    assert exact.rows[1].energy_pJ == pytest.approx(480 * 0.9)
    assert formula.rows[1].operations == pytest.approx(1000 * (0.2 + 0.3))
    assert exact.total_pJ == pytest.approx(2 * 480 * 0.9)
    assert "exact" in exact.accounting
    assert "not measured power" in exact.accounting


def test_the_first_conv_is_charged_per_step_or_once():
    image = layer(values=Values("real"), nonzero=[500, 500], synops=[9000, 9000])
    counts = counts_of(image, layer(name="b"))
    per_step, once = account(counts), account(counts, first_conv="once")
    assert per_step.rows[0].energy_pJ == pytest.approx(1800 * 4.6)
    assert once.rows[0].energy_pJ == pytest.approx(900 * 4.6)
    assert once.rows[1] == per_step.rows[1]
    assert once.other_first_conv_mJ == pytest.approx(per_step.total_mJ)
    assert per_step.other_first_conv_mJ == pytest.approx(once.total_mJ)
    unlike = account(counts_of(replace(image, nonzero=[500, 400])), first_conv="once")  # no step stands for the other
    assert unlike.rows[0].operations == 1800
    spikes = account(counts_of(layer()), first_conv="once")  # a first layer that takes spikes is charged as any other
    assert spikes.rows[0].operations == 480
    assert spikes.other_first_conv_mJ is None


def test_real_values_are_charged_as_products_and_named():
    report = account(counts_of(layer(), layer(name="late", values=Values("real"))))
    assert report.rows[1].kind == "MAC"
    assert any("not spike-driven" in note and "late" in note for note in report.notes)


def test_prices():
    assert {name: (cost.mac, cost.ac) for name, cost in COSTS.items()} == {
        "fp32": (4.6, 0.9),
        "fp16": (1.5, 0.4),
        "int8": (0.23, 0.03),
    }
    own = account(counts_of(layer()), cost=Cost("own", 10.0, 2.0))
    assert own.rows[0].energy_pJ == 960


def test_unknown_names_are_refused_with_the_valid_ones():
    for arguments in ({"mode": "excat"}, {"first_conv": "twice"}):
        with pytest.raises(ValueError, match="is not one of"):
            account(counts_of(layer()), **arguments)
    with pytest.raises(ValueError, match="exact=True"):
        account(counts_of(layer(synops=None)))
    with pytest.raises(ValueError, match="is not one of"):
        ann_macs(SdtShape(), "2N2D")


def test_extras_stay_out_of_the_total():
    counts = replace(counts_of(layer()), neurons_per_step={"a": 100, "b": 50}, norms_per_step={"n": 70})
    additions = SdtShape().residual_additions_per_step()
    arguments = dict(residual_additions=additions, memory_pJ_per_byte=24.96)
    rows = {row.name: row for row in extra_rows(["neurons", "residual", "batchnorm", "memory"], counts, COSTS["fp32"],
                                                **arguments)}  # fmt: skip
    assert rows["neurons"].energy_pJ == pytest.approx(2 * 150 * 4.6)
    assert rows["batchnorm"].energy_pJ == pytest.approx(2 * 70 * 4.6)
    assert rows["residual"].operations == 2 * 17 * 196 * 512
    assert memory_bytes(counts, COSTS["fp32"]) == 2 * (50 / 8 + 4 * (30 + 20))
    assert rows["memory"].energy_pJ == pytest.approx(24.96 * memory_bytes(counts, COSTS["fp32"]))
    report = replace(account(counts), extras=list(rows.values()))
    assert report.total_pJ == account(counts).total_pJ
    assert report.extras_mJ > 0
    with pytest.raises(ValueError, match="known family"):
        extra_rows(["residual"], counts, COSTS["fp32"], residual_additions=None, memory_pJ_per_byte=1)
    with pytest.raises(ValueError, match="is not one of"):
        extra_rows(["leakage"], counts, COSTS["fp32"], **arguments)


def test_attention_is_charged_for_the_spikes_that_meet():
    model = tiny_sdt()
    firing = FiringRecorder(model.spike_sources())
    with torch.no_grad(), firing, SynapseRecorder(model, sums=token_sums(model)) as recorder:
        model(torch.randn(4, 1, 8, 8))
    rows = {row.name: row for row in firing.rows(Process(0, 1, torch.device("cpu")))}
    k, v, met = (rows[f"MS_SSA_Conv0_{name}"] for name in ("k_lif", "v_lif", "kv_before"))
    rates = {"block.0.attn.kv_sum": [a + b for a, b in zip(k.rate, v.rate, strict=True)]}
    counts = recorder.counts()
    exact = {row.name: row for row in account(counts, sum_rates=rates).rows}["block.0.attn.kv_sum"]
    formula = {row.name: row for row in account(counts, mode="formula", sum_rates=rates).rows}["block.0.attn.kv_sum"]
    assert exact.operations == sum(met.spikes) / 4
    assert exact.kind == formula.kind == "AC"
    assert exact.energy_pJ == pytest.approx(0.9 * exact.operations)
    assert formula.operations == pytest.approx((sum(k.spikes) + sum(v.spikes)) / 4)
    assert exact.operations < formula.operations  # R-hat N D overcounts


def test_measure_energy_works_for_any_network_of_spiking_neurons():
    model = Multi().train()
    x = torch.randn(6, 5, 1, 8, 8)
    report = measure_energy(model, [x, x])
    assert model.training
    assert [row.kind for row in report.rows] == ["MAC", "AC", "AC"]
    assert report.time_steps == 6
    with torch.no_grad(), SynapseRecorder(model.eval()) as recorder:
        model(x)
    expected = [sum(row.synops) / 5 for row in recorder.counts().layers]
    assert [row.operations for row in report.rows] == expected
    assert report.total_pJ == pytest.approx(4.6 * expected[0] + 0.9 * sum(expected[1:]))


def test_paper_mode_charges_the_rates_of_the_supplement():
    model = tiny_sdt(T=2)
    firing = FiringRecorder(model.spike_sources())
    with torch.no_grad(), firing:
        model(torch.randn(3, 1, 8, 8))
    rates = {row.name: row.rate for row in firing.rows(Process(0, 1, torch.device("cpu")))}
    shape = SdtShape.of(model, 8, 8)
    rows = {row.name: row for row in paper_energy(shape, rates, PAPER_READING).rows}
    macs = shape.macs()
    assert rows["patch_embed.proj_conv"].energy_pJ == pytest.approx(
        4.6 * macs["patch_embed.proj_conv"] * sum(rates["MS_SPS_lif"])
    )
    mean = sum(sum(rates[f"MS_SSA_Conv0_{n}_lif"]) for n in "qkv") / 3
    assert rows["block.0.attn.q_conv"].operations == pytest.approx(macs["block.0.attn.q_conv"] * mean)
    assert rows["patch_embed.rpe_conv"].operations == pytest.approx(
        macs["patch_embed.rpe_conv"] * sum(rates["MS_SSA_Conv0_first_lif"])
    )
    once = paper_energy(shape, rates, replace(PAPER_READING, first="once"))
    assert once.rows[0].energy_pJ == pytest.approx(4.6 * macs["patch_embed.proj_conv"])


def test_a_silent_network_has_no_ratio():
    shape = SdtShape(height=32, width=32)
    silent = EnergyReport("exact", "once", COSTS["fp32"], 4, [])
    assert compare(shape, silent).ratio is None
    assert compare(shape, silent).attention_ratio is None


def test_extras_of_the_first_conv_are_charged_as_often_as_it_is():
    image = layer(values=Values("real", 0.1, 2.5), nonzero=[500, 500], synops=[9000, 9000])
    counts = replace(counts_of(image, layer(name="b")), norms_per_step={"n": 20, "m": 70})
    arguments = dict(residual_additions=None, memory_pJ_per_byte=1.0)

    def charged(counts, first_conv):
        rows = extra_rows(["batchnorm", "memory"], counts, COSTS["fp32"], first_conv=first_conv, **arguments)
        return [row.operations for row in rows]

    each_step = [2 * (20 + 70), memory_bytes(counts, COSTS["fp32"])]
    assert charged(counts, "per_step") == each_step
    assert charged(counts, "once") == [20 + 2 * 70, each_step[1] - 4 * (50 + 30 + 20)]
    unlike = replace(counts, layers=[replace(image, nonzero=[500, 400]), *counts.layers[1:]])
    assert charged(unlike, "once") == each_step  # no step stands for the others
    elsewhere = replace(counts, norms_per_step={"m": 70, "n": 20})  # the first BatchNorm is not the first conv's
    assert charged(elsewhere, "once")[0] == each_step[0]


def test_memory_of_an_image_is_counted_in_bytes():
    spikes, image = counts_of(layer()), counts_of(layer(values=Values("real", 0.1, 2.5)))
    weights_and_outputs = 2 * 4 * (30 + 20)
    assert memory_bytes(spikes, COSTS["fp32"]) == weights_and_outputs + 2 * 50 / 8
    assert memory_bytes(image, COSTS["fp32"]) == weights_and_outputs + 2 * 50 * 4
    assert memory_bytes(image, COSTS["int8"]) == (weights_and_outputs + 2 * 50 * 4) / 4


def test_the_spread_between_samples_adds_up_to_what_each_sample_takes_alone():
    model = tiny_sdt().double()
    x, labels = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 0, 1, 0, 0])

    def counted(batches):
        with torch.no_grad(), SynapseRecorder(model, sums=token_sums(model)) as recorder:
            for batch in batches:
                model(batch)
        return recorder.counts()

    def charged(batches, labels=None, first_conv="once"):
        return account(counted(batches), first_conv=first_conv, labels=labels)

    alone = torch.tensor([charged([one]).total_pJ for one in x.split(1)], dtype=torch.float64)
    assert len(set(alone.tolist())) == 5
    for first_conv in ("once", "per_step"):
        report = charged(x.split([3, 2]), labels, first_conv)
        assert report.per_sample.energy_pJ.mean == pytest.approx(report.total_pJ)
    spread = charged(x.split([3, 2]), labels).per_sample
    assert spread.energy_pJ.minimum == pytest.approx(float(alone.min()))
    assert spread.energy_pJ.sd == pytest.approx(float(alone.std()))
    assert spread.worst == int(alone.argmax())
    assert spread.by_class[0][1].mean == pytest.approx(float(alone[labels == 0].mean()))
    assert (spread.by_class[0][1].samples, spread.by_class[1][1].samples) == (3, 2)
    assert account(replace(counted([x]), by_sample=None)).per_sample is None


def test_figures_of_the_docs_are_written_where_they_are_marked():
    from benchmarks.docs_figures import DOCS, rewritten

    text = "before <!-- demo: pool -->old<!-- end --> after"
    assert rewritten(text, {"pool": "new"}) == "before <!-- demo: pool -->new<!-- end --> after"
    filled = dict.fromkeys(("token_sum", "pool", "spread"), "x")
    assert rewritten(DOCS.read_text(), filled).count("-->x<!--") == len(filled)
