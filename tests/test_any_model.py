"""firing_num.py measures any model that returns (logits, hook): what it cannot know is left out, and it says why."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from test_firing import ALONE
from test_synapses import Multi, Single
from timm.models import register_model
from tiny import tiny
from torch import nn

import firing_num
from model import SpikeDrivenTransformer
from module.attention import MS_SSA_Conv
from module.mlp import MS_MLP_Conv
from module.neuron import make_neuron, sj_neuron
from utils.errors import UserError
from utils.measure.family import family_of
from utils.measure.firing import FiringRecorder, spike_sources

TINY = """
model: model_under_test
dataset: digits
num_classes: 10
in_channels: 1
img_size: 16
time_steps: 2
val_batch_size: 180
workers: 0
"""
BUILD = {}


@register_model
def model_under_test(pretrained=False, **kwargs):
    return BUILD["now"]()


@pytest.fixture
def measure(tmp_path):
    """Measure the model that a function builds; exit status, report.json, report.html."""

    def run(build, *argv):
        BUILD["now"] = build
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.4 if parameter.dim() == 1 else 0.0, 0.5)
        torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth.tar")
        (tmp_path / "tiny.yml").write_text(TINY)
        words = ["-c", str(tmp_path / "tiny.yml"), "--resume", str(tmp_path / "a.pth.tar"), "--device", "cpu"]
        status = firing_num.main([*words, "--output", str(tmp_path), "--experiment", "out", *argv])
        out = tmp_path / "out"
        return status, json.loads((out / "report.json").read_text()), (out / "report.html").read_text()

    return run


def sdt(**changes):
    return tiny(**(dict(in_channels=1, num_classes=10, num_heads=2) | changes))


class Foreign(nn.Module):
    """A network that promises nothing but T and its output; with T steps in one call, or a loop over single steps."""

    T = 3

    def __init__(self, step_mode="m"):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.fire = sj_neuron.IFNode(step_mode=step_mode)
        self.conv = nn.Conv2d(4, 6, 3, stride=2)
        self.fire_again = sj_neuron.LIFNode(step_mode=step_mode)
        self.fc = nn.Linear(6 * 3 * 3, 10)
        self.step_mode = step_mode

    def forward(self, x):
        for neuron in (self.fire, self.fire_again):
            neuron.reset()
        x = self.stem(x)  # once: before time begins
        if self.step_mode == "s":
            steps = [self.fire_again(self.conv(self.fire(x))) for _ in range(3)]
            return self.fc(torch.stack(steps).flatten(2)).mean(0), None
        s = self.conv(self.fire(x.expand(3, -1, -1, -1, -1)).flatten(0, 1)).unflatten(0, (3, -1))
        return self.fc(self.fire_again(s).flatten(2)).mean(0), None


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_a_model_of_no_known_family_is_measured_from_its_neurons(measure, tmp_path, capsys, step_mode):
    status, report, page = measure(
        lambda: Foreign(step_mode), "--verify", "--attention-map", "1", "--sweep-T", "3", "5", "--energy-mode", "paper",
        "--energy-extras", "neurons", "residual",
    )  # fmt: skip
    assert status == 0
    assert report["verification"]["passed"]
    assert (report["samples"], report["time_steps"]) == (360, 3)
    assert [row["name"] for row in report["tensors"]] == ["fire", "fire_again"]
    assert all(len(row["rate"]) == 3 and 0 < row["mean_rate"] < 1 for row in report["tensors"])
    assert report["tensors"][1]["elements_per_step"] == 360 * 6 * 3 * 3
    layers = {row["name"]: row for row in report["energy"]["layers"]}
    assert [(name, row["kind"], row["steps"]) for name, row in layers.items()] == [
        ("stem", "MAC", 1),
        ("conv", "AC", 3),
        ("fc", "AC", 3),
    ]
    assert layers["conv"]["mean_rate"] == pytest.approx(report["tensors"][0]["mean_rate"])
    assert report["model"] is report["ann_twin"] is report["self_attention"] is None
    assert [total["mode"] for total in report["totals"]] == ["formula"]
    assert [row["name"] for row in report["energy"]["extras"]] == ["neurons"]
    family, maps, sweep = report["notes"]
    assert family == (
        "left out for this model, since it is of no known family: the paper's names and energy mode (energy_mode is "
        "now formula), the comparison with an ANN, the extra 'residual'"
    )
    assert "attention maps, since" in maps
    assert "asked for 5 time steps, the model ran 3" in sweep
    assert report["sweep"] == []
    shown = capsys.readouterr().out
    assert all(note in shown and note.split(",")[0] in page for note in report["notes"])
    assert [word for word in ("ANN twin", "paper</th>", "SDT") if word in page + shown] == []
    with (tmp_path / "out" / "layers.csv").open() as file:
        assert {row["paper_name"] for row in csv.DictReader(file)} == {""}


class Silent(nn.Module):
    """No neuron, no convolution: nothing to count but its accuracy."""

    T = 1

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(10))

    def forward(self, x):
        return x.flatten(1)[:, :10] + self.bias, None


def test_a_model_in_which_nothing_can_be_counted_still_gets_its_report(measure):
    _, report, _ = measure(Silent)
    assert report["mean_firing_rate"] is None
    assert report["energy"]["layers"] == report["tensors"] == []
    assert report["energy"]["notes"] == report["energy"]["incomplete"] == []
    assert any("firing rates, since the model has no" in note for note in report["notes"])


class NewName(SpikeDrivenTransformer):
    def spike_sources(self):
        return super().spike_sources() | {"MS_SSA_Conv0_gate": self.block[0].attn.talking_heads_lif}


def test_a_spike_tensor_with_a_new_name_has_no_paper_name(measure):
    _, report, _ = measure(lambda: sdt(kind=NewName))
    assert (report["tensors"][-1]["name"], report["tensors"][-1]["paper_name"]) == ("MS_SSA_Conv0_gate", "")
    assert report["tensors"][-1]["rate"] == report["tensors"][9]["rate"]
    assert report["ann_twin"]["ratio"] > 0
    assert report["notes"] == []


class WiderMLP(MS_MLP_Conv):
    def __init__(self, *args):
        super().__init__(*args)
        self.extra_lif, self.extra_conv = make_neuron(), nn.Conv2d(args[0], args[0], 1)

    def forward(self, x):
        y = self.extra_conv(self.extra_lif(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return super().forward(x) + y


def test_one_more_convolution_in_a_block_is_measured_without_what_belongs_to_the_paper(measure):
    def build():
        model = sdt()
        model.block[0].mlp = WiderMLP(16, 32)
        return model

    status, report, page = measure(build, "--verify", "--attention-map", "1", "--sweep-T", "1", "3")
    assert status == 0
    layers = {row["name"]: row for row in report["energy"]["layers"]}
    assert layers["block.0.mlp.extra_conv"]["operations"] > 0
    assert not any("kv_sum" in name for name in layers)
    assert [point["time_steps"] for point in report["sweep"]] == [1, 3]
    assert report["attention_maps"] == ["attention.png"]  # its attention is as it was
    (note,) = report["notes"]
    assert "other layers than an SDT 1-16 (block.0.mlp.extra_conv: 4096 MACs per step instead of none)" in note
    assert "ANN twin" not in page


class Graded(nn.Module):
    """Whole numbers from 0 to 3."""

    def forward(self, x):
        return x.clamp(0, 3).ceil()


def test_neurons_of_whole_numbers_are_named_and_charged_as_the_additions_they_are(measure, capsys):
    def build():
        model = sdt()
        model.patch_embed.proj_lif1 = Graded()
        model.block[0].attn.k_lif = Graded()
        return model

    status, report, page = measure(build, "--verify")
    assert status == 1
    assert "FAILED  other values than 0 and 1 enter patch_embed.proj_conv2" in capsys.readouterr().out
    assert report["time_steps"] == 2
    kinds = {row["name"]: row["kind"] for row in report["energy"]["layers"]}
    assert {name for name, kind in kinds.items() if kind == "MAC"} == {"patch_embed.proj_conv"}
    conventions = {row["name"]: row["convention"] for row in report["energy"]["layers"]}
    assert conventions["patch_embed.proj_conv2"] == "whole numbers up to 2: a spike of n is n additions"
    assert conventions["patch_embed.proj_conv3"] == "a spike is one addition"
    tensors = {row["name"]: row for row in report["tensors"]}
    graded = tensors["MS_SPS_lif1"]
    assert graded["spikes"] < graded["nonzero"]
    assert graded["mean_rate"] == pytest.approx(sum(graded["nonzero"]) / (2 * graded["elements_per_step"]))
    (note,) = report["notes"]
    assert note.startswith("not spikes of 0 and 1: MS_SPS_lif1, MS_SSA_Conv0_k_lif")
    assert "charged as AC, whole numbers up to 2: a spike of n is n additions: patch_embed.proj_conv2" in page


class OwnAttention(nn.Module):
    """An attention of one's own, with tensors of its own."""

    def __init__(self, dim=16):
        super().__init__()
        self.lif, self.gate_conv, self.gate_lif = make_neuron(), nn.Conv2d(dim, dim, 1), make_neuron()

    def forward(self, x):
        gate = self.gate_lif(self.gate_conv(self.lif(x).flatten(0, 1)).unflatten(0, x.shape[:2]))
        return x * (1 - gate)

    def spike_sources(self, prefix):
        return {f"{prefix}_in": self.lif, f"{prefix}_gate": self.gate_lif}


class OnlyQ(MS_SSA_Conv):
    """Derived: k, v and the tensors after them are never computed."""

    def forward(self, x):
        s = self.q_conv(self.shortcut_lif(x).flatten(0, 1))
        y = self.proj_conv(self.q_lif(self.q_bn(s).unflatten(0, x.shape[:2])).flatten(0, 1))
        return x + y.unflatten(0, x.shape[:2])


@pytest.mark.parametrize(("attention", "tensors"), [(OwnAttention, 9), (OnlyQ, 9)])
def test_an_attention_of_ones_own_in_a_model_that_is_else_known(measure, attention, tensors):
    def build():
        model = sdt()
        model.block[0].attn = attention(16)
        return model

    status, report, _ = measure(
        build, "--verify", "--attention-map", "1", "--sweep-T", "1", "--energy-mode", "formula"
    )  # fmt: skip
    assert status == 0
    assert len(report["tensors"]) == tensors
    assert report["verification"]["passed"]
    assert report["sweep"][0]["energy_mJ"] < report["energy"]["total_mJ"]
    assert report["attention_maps"] == []
    notes = "\n".join(report["notes"])
    assert "it runs other layers than an SDT 1-16" in notes
    assert "left out: attention maps" in notes
    assert ("never computed, so without a firing rate: MS_SSA_Conv0_k_lif" in notes) == (attention is OnlyQ)


def test_what_cannot_be_measured_is_told_before_the_evaluation(measure, monkeypatch):
    monkeypatch.setattr("utils.measure.measurement.Measurement.evaluate", lambda *_: pytest.fail("it was evaluated"))

    class Wrong(Foreign):
        def forward(self, x):
            self.fire.step_mode = "m"
            self.fire_again(self.fire(x.unsqueeze(1)))  # each sample taken for a step
            return super().forward(x)

    with pytest.raises(UserError, match="model: model_under_test cannot be measured: fire: this batch has 3 time"):
        measure(Wrong)


def test_single_step_neurons_fire_what_multi_step_ones_do():
    x = torch.randn(6, 5, 1, 8, 8, dtype=torch.float64)
    found = []
    for kind in (Multi, Single):
        model = kind().double().eval()
        with torch.no_grad(), FiringRecorder(spike_sources(model), model) as recorder:
            model(x)
            model(x[:, :2])
        found.append(recorder.rows(ALONE))
    assert found[0] == found[1]
    assert [(row.name, len(row.rate), row.elements_per_step) for row in found[1]] == [
        ("lif1", 6, 7 * 4 * 8 * 8),
        ("lif2", 6, 7 * 4 * 3 * 3),
    ]


def test_a_model_is_of_a_family_only_with_all_of_its_sizes():
    model = sdt()
    assert family_of(model, 16, 16).shape.title == "SDT 1-16"
    assert family_of(sdt(mlp_ratios=0.5), 16, 16) is not None
    model.embed_dims = [16, 32]
    assert family_of(model, 16, 16) is None
    del model.embed_dims
    assert family_of(model, 16, 16) is None
