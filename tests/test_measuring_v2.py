"""Measuring V2 by the command line, from a file in the published form: rates, both forms, energy, maps, sweep."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from golden import load_json, load_tensors, under
from golden_v2 import TOLERANCE, golden_model

import firing_num
from model import sdt_v2
from utils.config.parse import parse_config
from utils.errors import UserError
from utils.measure.energy import measure_energy
from utils.measure.family import family_of
from utils.measure.firing import FiringRecorder, spike_sources
from utils.measure.measurement import Measurement
from utils.measure.sdt_v2.shape import SdtV2Shape
from utils.measure.verify import verify_spike_driven
from utils.run.build import build_model, prepare_for_training
from utils.run.distributed import Process
from utils.run.precision import Precision

MACS = load_json("v2/macs_v2")


@pytest.mark.parametrize("form", ["as_trained", "merged"])
@pytest.mark.parametrize("size", MACS)
def test_layers_and_products_of_each_size_are_the_published_ones(size, form):
    golden = MACS[size]
    shape = SdtV2Shape(tuple(golden["embed_dims"]), merged=form == "merged")
    expected = {name.removesuffix("+pwconv2"): macs for name, macs in golden[f"macs_{form}"].items()}
    assert shape.macs() == expected
    assert sum(shape.macs().values()) == golden[f"total_{form}"]
    products = golden["attention_products_without_weights"]
    assert shape.attention_macs() == {
        f"{n}{p}": macs // 2 for n, macs in products.items() for p in (": bmm", ": bmm 2")
    }


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_counted_is_what_the_sizes_say(merged):
    tensors, model = golden_model("t2_kd_odd_size")
    model = model.eval().fuse() if merged else model.eval()
    shape = SdtV2Shape.of(model, 72, 56)
    report = measure_energy(model, [tensors["input"]])
    assert {row.name: row.macs_per_step for row in report.rows} == shape.macs() | shape.attention_macs()
    assert report.incomplete == []
    kinds = {row.name for row in report.rows if row.kind == "MAC"} - {"downsample1_1.encode_conv"}
    inner = {name for name in shape.macs() if name.endswith((".pwconv2", ".body.2.0", ".body.2.1"))}
    assert kinds == (set() if merged else inner)


def test_the_two_products_of_attention_are_additions_of_selected_rows():
    tensors, model = golden_model("t4_h4")
    report = measure_energy(model.eval(), [tensors["input"]])
    hook = {}
    with torch.no_grad():
        model(tensors["input"], hook)
    rows = {row.name: row for row in report.rows}
    q, k, v = (hook[f"block3.0.attn.{x}_lif"].flatten(3).unflatten(2, (4, -1)) for x in "qkv")  # [T, B, h, d, N]
    # k^T v: where a token's k fires, its spikes of v are added. A sample has T steps of them.
    first = (k.sum(3) * v.sum(3)).sum() / len(tensors["input"])
    assert rows["block3.0.attn: bmm"].operations == float(first)
    assert rows["block3.0.attn: bmm"].kind == rows["block3.0.attn: bmm 2"].kind == "AC"
    # q (k^T v): each spike of q adds a row of d whole numbers.
    assert rows["block3.0.attn: bmm 2"].operations == float(q.sum()) * q.shape[3] / len(tensors["input"])


SIZES = ["--embed-dims", "8", "8", "16", "24", "--depths", "1", "1", "--num-heads", "4"]
SETTINGS = """
model: sdt_v2
dataset: digits
num_classes: 10
in_channels: 1
img_size: 8
val_batch_size: 180
workers: 0
device: cpu
kernels: plain
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file in the published form, with a second head, trained at T = 2."""
    folder = tmp_path_factory.mktemp("v2")
    torch.manual_seed(0)
    model = sdt_v2(embed_dims=[8, 8, 16, 24], depths=[1, 1], num_heads=4, in_channels=1, num_classes=10, kd=True)
    for module in model.modules():  # fresh weights are silent
        if hasattr(module, "running_var"):
            torch.nn.init.uniform_(module.weight, 1.0, 2.0)
            torch.nn.init.uniform_(module.bias, 0.3, 1.2)
    args = argparse.Namespace(time_steps=2, kd=True)
    torch.save({"model": model.state_dict(), "args": args, "epoch": 3, "optimizer": {}}, folder / "55M_kd_T2.pth")
    (folder / "v2.yml").write_text(SETTINGS)
    return folder


def measure(folder, name, *argv):
    words = ["-c", str(folder / "v2.yml"), "--resume", str(folder / "55M_kd_T2.pth"), *SIZES, "--output", str(folder)]
    status = firing_num.main([*words, "--experiment", name, *argv])
    return status, json.loads((folder / name / "report.json").read_text())


def test_a_released_file_is_measured_merged_with_its_own_head_and_time_steps(released, capsys):
    status, report = measure(released, "merged", "--attention-map", "1", "--sweep-T", "4")
    assert status == 0
    assert report["time_steps"] == 2
    assert len(report["tensors"]) == 4 * 4 + 4 + 2 * 7 + 1
    assert report["model"]["merged"]
    assert report["model"]["kd"]
    assert {row["kind"] for row in report["energy"]["layers"][1:]} == {"AC"}
    assert [point["time_steps"] for point in report["sweep"]] == [4]
    assert report["attention_maps"] == ["attention.png"]
    assert {total["mode"] for total in report["totals"]} == {"exact", "formula"}
    assert report["ann_twin"]["attention"] == "linear"
    shown = capsys.readouterr().out
    assert "(merged, T = 2, mode exact, first conv once" in shown
    notes = "\n".join(report["notes"])
    assert "mean firing rate by stage, each spike tensor counted once: stage 1 " in notes
    assert ("before 2024-03-25" in notes) == (report["top1_percent"] <= 50)


@pytest.fixture(scope="module", params=["t1_h2", "t2_kd_odd_size"])
def published(request, tmp_path_factory):
    """Golden weights in the released form: the file, the options for its sizes, input and logits."""
    meta, tensors = load_tensors(f"v2/{request.param}")
    sizes, path = meta["kwargs"], tmp_path_factory.mktemp("published") / "55M.pth"
    args = argparse.Namespace(time_steps=sizes["T"], kd=sizes["kd"], model="metaspikformer_8_512", blr=6e-4)
    torch.save({"model": under(tensors, "state"), "args": args, "epoch": 19, "optimizer": {}, "scaler": {}}, path)
    argv = ["--model", "sdt_v2", "--num-classes", str(sizes["num_classes"]), "--num-heads", str(sizes["num_heads"])]
    argv += ["--embed-dims", *map(str, sizes["embed_dims"]), "--depths", *map(str, sizes["depths"])]
    argv += ["--dataset", "imagenet", "--img-size", "64", "--device", "cpu", "--kernels", "plain"]
    return sizes, str(path), argv, tensors["input"].double(), tensors["eval/logits"]


def logits_of(model, x):
    """In evaluation mode and float64, in which the golden weights are exact."""
    with torch.no_grad():
        return model.eval().double()(x)[0]


def test_a_released_file_is_measured_with_the_published_logits(published):
    sizes, path, argv, x, expected = published
    cfg = parse_config(["--resume", path, *argv, "--form", "trained"], prog="firing_num.py", description="")
    measurement = Measurement(cfg, Process(0, 1, torch.device("cpu")))
    assert measurement.cfg.time_steps == measurement.model.T == sizes["T"]
    assert hasattr(measurement.model, "head_kd") == sizes["kd"]
    torch.testing.assert_close(logits_of(measurement.model, x), expected, rtol=0, atol=TOLERANCE)


def test_training_starts_from_a_released_file_with_the_published_logits(published):
    sizes, path, argv, x, expected = published
    argv += ["--initial-checkpoint", path, "--time-steps", str(sizes["T"])]
    argv += ["--kd", "hard", "--teacher", "resnet18"] if sizes["kd"] else []
    cfg, process = parse_config(argv, prog="train.py", description=""), Process(0, 1, torch.device("cpu"))
    model, _ = prepare_for_training(cfg, build_model(cfg), process, Precision(cfg, process.device))
    torch.testing.assert_close(logits_of(model, x), expected, rtol=0, atol=TOLERANCE)


def test_the_form_as_trained_charges_products_where_real_values_enter(released, capsys):
    status, report = measure(
        released, "trained", "--form", "trained", "--time-steps", "1", "--energy-extras", "residual"
    )
    assert status == 0
    assert not report["model"]["merged"]
    layers = {row["name"]: row for row in report["energy"]["layers"] if row["operations"]}
    inner = {name for name in layers if name.endswith((".pwconv2", ".body.2.0", ".body.2.1"))}
    assert len(inner) >= 2 * 4 * 2
    assert {name for name, row in layers.items() if row["kind"] == "MAC"} == {"downsample1_1.encode_conv"} | inner
    assert "(as trained, T = 1, mode exact, first conv once" in capsys.readouterr().out
    assert "measured at T = 1, the checkpoint was trained at T = 2" in "\n".join(report["notes"])
    (extra,) = report["energy"]["extras"]
    # Pixels of the four convolutional blocks at 8 x 8 are 16, 4, 1 and 1, and there is one token.
    assert extra["operations"] == 2 * (4 * 16 + 8 * 4 + 2 * 8 * 1 + 16 + 24)


def test_the_papers_mode_is_refused_with_the_reason(released):
    with pytest.raises(
        UserError, match="energy_mode: paper is not there for sdt_v2: the formulas of V2's energy stand"
    ):
        measure(released, "paper", "--energy-mode", "paper")


def test_a_model_is_of_the_family_by_its_sizes():
    model = sdt_v2(embed_dims=(4, 8, 8, 8), depths=(1, 1), num_heads=2)
    assert family_of(model, 16, 16).shape.title == "SDT V2 4-8-8-8"
    assert family_of(model, 16, 16).form == "as trained"
    del model.depths
    assert family_of(model, 16, 16) is None


def test_golden_rates_are_those_that_are_reported():
    tensors, model = golden_model("t3_h1_nonsquare")

    with torch.no_grad(), FiringRecorder(spike_sources(model), model) as recorder:
        model.eval()(tensors["input"])
    rows = {row.name: row.rate for row in recorder.rows(Process(0, 1, torch.device("cpu")))}
    golden = under(tensors, "eval/rate")
    assert rows.keys() == golden.keys()
    for name, rate in rows.items():
        assert rate == pytest.approx(golden[name].tolist(), rel=1e-14), name


def test_the_merged_form_is_spike_driven_and_the_form_as_trained_names_the_layers_that_are_not():
    tensors, model = golden_model("t2_kd_odd_size")
    x = tensors["input"][:1, :, :24, :24]  # any size works; additions are slow
    trained = verify_spike_driven(model.eval(), x)
    assert not trained.passed
    inner = (".Conv.pwconv2", ".body.2.0", ".body.2.1")
    assert set(trained.not_binary) == {n for n, _ in model.named_modules() if n.endswith(inner)}
    assert trained.unsupported == []
    merged = verify_spike_driven(model.fuse(), x)
    assert merged.passed, merged.lines()
    assert {"block3.0.attn: bmm", "block3.0.attn: bmm 2", "block4.0.mlp.fc1_conv"} <= merged.additions.keys()
    assert {"downsample2.encode_conv", "ConvBlock2_2.0.Conv.dwconv"} <= merged.additions.keys()  # stride 2, 7x7
