"""firing_num.py from the command line to its files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from measuring import fresh_weights, run
from PIL import Image

import firing_num
from model import sdt
from utils.config.parse import load_yaml
from utils.data.loaders import build_eval_loader
from utils.errors import UserError
from utils.measure import measurement
from utils.measure.energy import COSTS
from utils.report.rates import RatesReport
from utils.run.models import create_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def test_the_report_has_every_part(full):
    report, _ = full
    assert report["schema"] == "sdt-report/1"
    assert (report["samples"], report["time_steps"]) == (360, 3)
    assert [row["name"] for row in report["tensors"]][-1] == "head_lif"
    layers = {row["name"]: row for row in report["energy"]["layers"]}
    assert len(layers) == 5 + 2 * 7 + 1
    assert layers["block.1.attn.q_conv"]["paper_name"] == "block 2 V_S"
    assert layers["patch_embed.proj_conv"]["kind"] == "MAC"
    assert {row["kind"] for name, row in layers.items() if name != "patch_embed.proj_conv"} == {"AC"}
    assert report["energy"]["total_mJ"] * 1e9 == pytest.approx(sum(row["energy_pJ"] for row in layers.values()))
    assert [total["mode"] for total in report["totals"]] == ["exact", "formula", "paper"]
    assert report["verification"]["passed"]
    assert report["checkpoint"]["epoch"] == 3
    assert len(report["checkpoint"]["sha256"]) == 64
    assert report["config"]["time_steps"] == 3
    assert "torch" in report["versions"]


def test_the_report_has_the_accuracy_and_rates_of_the_model(measured, full):
    """Computed once more, from the model's own hook; float32 in other batches may flip a spike or two."""
    report, _ = full
    cfg = load_yaml(measured / "tiny.yml")
    found = create_model(cfg)
    found.load_state_dict(fresh_weights(0))
    logits, labels, rates = [], [], []
    for x, y in build_eval_loader(cfg, device=torch.device("cpu")):
        with torch.no_grad():
            out, hook = found.eval()(x, {})
        logits.append(out)
        labels.append(y)
        rates.append([float(spikes.mean()) for spikes in hook.values()])
    logits, labels = torch.cat(logits), torch.cat(labels)
    ranked = logits.topk(5).indices == labels[:, None]
    assert report["top1_percent"] == pytest.approx(100 * float(ranked[:, 0].float().mean()), abs=0.6)
    assert report["top5_percent"] == pytest.approx(100 * float(ranked.any(1).float().mean()), abs=0.6)
    assert report["top1_percent"] + 5 < report["top5_percent"]
    assert report["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-2)
    weights = torch.tensor([100.0, 100.0, 100.0, 60.0])
    mean = (torch.tensor(rates) * weights[:, None]).sum(0) / 360
    assert [row["mean_rate"] for row in report["tensors"]] == pytest.approx(mean.tolist(), abs=2e-3)
    assert [row["name"] for row in report["tensors"]] == list(hook)


def test_an_image_is_not_charged_t_times_in_the_first_conv(full):
    report, _ = full
    first = report["energy"]["layers"][0]
    assert report["energy"]["first_conv"] == "once"
    assert first["operations"] == pytest.approx(first["exact_operations"] / 3)
    assert report["energy"]["total_mJ_other_first_conv"] > report["energy"]["total_mJ"]


def test_both_sides_are_priced_by_each_model(full):
    report, folder = full
    models = {row["model"]: row for row in report["energy_models"]}
    assert list(models) == ["compute", "flat", "lemaire"]
    assert models["compute"]["snn_mJ"] == pytest.approx(report["energy"]["total_mJ"])
    assert models["compute"]["ann_mJ"] == pytest.approx(report["ann_twin"]["energy_mJ"])
    assert models["compute"]["ann_ratio"] == pytest.approx(report["ann_twin"]["ratio"])
    for row in models.values():
        assert row["quantised_bits"] == 2  # T = 3
        assert row["firing_rate"] == report["mean_firing_rate"]
        for side in ("snn", "ann", "quantised_ann"):
            assert row[f"{side}_mJ"] == pytest.approx(sum(row[f"{side}_parts_mJ"].values()))
        assert row["ann_ratio"] > row["quantised_ann_ratio"]
    assert models["flat"]["ann_ratio"] < 1 < models["compute"]["ann_ratio"]  # what compute alone does not show
    assert (folder / "ratio.png").stat().st_size > 5000
    page = (folder / "report.html").read_text()
    assert "Energy by model" in page
    assert "below 1 the twin needs less" in page


def test_neurobench_metrics_are_reported(full):
    report, _ = full
    found = report["neurobench"]
    assert found["connection_sparsity"] == 0
    layers = report["energy"]["layers"]
    # NeuroBench counts the first conv at each step
    assert found["effective_macs"] == pytest.approx(layers[0]["exact_operations"])
    added = sum(row["exact_operations"] for row in layers if row["kind"] == "AC" and row["type"] != "sum")
    assert found["effective_acs"] == pytest.approx(added)
    assert found["effective_macs"] + found["effective_acs"] < found["dense"]
    assert 0 < found["activation_sparsity"] < 1
    assert found["membrane_updates"] > 0
    assert found["membrane_update_samples"] == 8


def test_prices_of_ones_own_come_from_a_file(measured):
    (measured / "own.yml").write_text("chip: {source: none, mac_pj: 10, ac_pj: 2, bytes_per_value: 4}\n")
    own = ("--hardware", str(measured / "own.yml"), "--energy-cost", "chip", "--energy-model", "flat")
    status, report = run(measured, "own", *own)
    assert status == 0
    assert report["energy"]["cost"]["name"] == "chip"
    assert report["energy_models"] == []
    assert any("energy model flat, since preset chip has no memory_pj_per_byte" in note for note in report["notes"])
    _, priced = run(measured, "priced", *own, "--memory-pj", "1")
    assert [row["model"] for row in priced["energy_models"]] == ["flat"]


def test_extras_are_beside_the_total(full):
    report, _ = full
    energy = report["energy"]
    assert [row["name"] for row in energy["extras"]] == ["neurons", "memory"]
    assert energy["extras_mJ"] > 0
    assert energy["total_mJ"] == report["totals"][0]["energy_mJ"]


def test_the_sweep_measures_each_t(full):
    report, folder = full
    assert [point["time_steps"] for point in report["sweep"]] == [1, 4]
    one, four = report["sweep"]
    assert 0 < one["energy_mJ"] < four["energy_mJ"]
    assert all(point["latency_ms"] > 0 for point in report["sweep"])
    assert report["time_steps"] == 3  # the model is back at its own
    assert (folder / "sweep.png").stat().st_size > 5000


def test_the_sweep_agrees_with_a_run_at_that_t(measured, full):
    report, _ = full
    _, alone = run(measured, "four", "--time-steps", "4")
    assert alone["top1_percent"] == report["sweep"][1]["top1_percent"]
    assert alone["mean_firing_rate"] == report["sweep"][1]["mean_firing_rate"]
    assert alone["energy"]["total_mJ"] == report["sweep"][1]["energy_mJ"]


def test_tables_for_machines(full):
    report, folder = full
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows][:-2] == [row["name"] for row in report["energy"]["layers"]]
    assert float(rows[3]["energy_pJ"]) == report["energy"]["layers"][3]["energy_pJ"]
    assert {row["mode"] for row in rows} == {"exact"}
    told_apart = 0
    for row, layer in zip(rows, report["energy"]["layers"], strict=False):
        assert [float(row[f"rate_t{t}"]) for t in (1, 2, 3)] == layer["rate"]
        told_apart += layer["rate"] != layer["rate"][::-1]
    assert told_apart > 10
    with (folder / "firing.csv").open() as file:
        firing = list(csv.DictReader(file))
    assert len(firing) == 3 * len(report["tensors"])


def test_a_report_is_a_file_of_rates(full):
    report, folder = full
    again = RatesReport(str(folder / "report.json"), COSTS["fp32"])
    (paper,) = (total for total in report["totals"] if total["mode"] == "paper")
    assert again.chosen.total_mJ == pytest.approx(paper["energy_mJ"], rel=1e-12)


def test_moving_average_weights_on_request(measured, full):
    """They are those of a checkpoint that has nothing else."""
    report, _ = full
    torch.save({"state_dict": fresh_weights(1)}, measured / "average.pth.tar")
    _, averaged = run(measured, "ema", "--use-ema")
    _, alone = run(measured, "average", "--resume", str(measured / "average.pth.tar"))
    assert averaged["tensors"] == alone["tensors"]
    for name, weights in (("ema", "moving average"), ("average", "as trained")):
        page = (measured / "out" / name / "report.html").read_text()
        assert re.search(rf"weights</t.>\s*<td[^>]*>{weights}</td>", page), name
    assert averaged["tensors"] != report["tensors"]


@pytest.mark.parametrize("mode", ["formula", "paper"])
def test_other_modes_agree_with_the_exact_run(measured, full, mode):
    report, _ = full
    _, other = run(measured, mode, "--energy-mode", mode)
    (expected,) = (total["energy_mJ"] for total in report["totals"] if total["mode"] == mode)
    assert other["energy"]["mode"] == mode
    assert other["energy"]["total_mJ"] == pytest.approx(expected, rel=1e-12)


def test_batches_and_tet_do_not_change_the_result(measured, full):
    report, _ = full
    _, other = run(measured, "batches", "-b", "77", "--TET")
    # Counts are exact; but float32 sums in another order with another batch size, which can flip a spike or two.
    for row, again in zip(report["tensors"], other["tensors"], strict=True):
        assert row["elements_per_step"] == again["elements_per_step"]
        assert row["mean_rate"] == pytest.approx(again["mean_rate"], rel=2e-3)
    assert other["energy"]["total_mJ"] == pytest.approx(report["energy"]["total_mJ"], rel=2e-3)
    assert other["top1_percent"] == pytest.approx(report["top1_percent"], abs=0.6)


def test_own_costs(measured):
    _, report = run(measured, "own", "--mac-pj", "10", "--ac-pj", "2", "--first-conv", "per_step", "--ann-attention",
                    "paper", "--img-size", "32")  # fmt: skip
    layers = report["energy"]["layers"]
    assert layers[0]["energy_pJ"] == pytest.approx(10 * layers[0]["exact_operations"])
    assert layers[1]["energy_pJ"] == pytest.approx(2 * layers[1]["exact_operations"])
    assert report["ann_twin"]["attention"] == "paper"
    assert report["model"]["height"] == 32
    assert report["energy"]["cost"]["name"] == "own costs"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--attention-map", "0"], "give 1 to 64"),
        (["--attention-map", "missing.png"], "missing.png: no such file"),
        (["--attention-map", "CHANGELOG.md"], "no image that can be read"),
        (["--use-ema", "--resume", "{plain}"], "state_dict_ema"),
        (["--sweep-T", "2", "2"], "sweep_T has 2 more than once"),
        (["--sweep-T", "0"], "whole number >= 1"),
        (["--energy-mode", "excat"], "did you mean exact?"),
        (["--energy-extras", "neuron"], "did you mean neurons?"),
        (["--from-rates", "a.json"], "exclude each other"),
        (["--mac-pj", "0"], "a number > 0"),
        (["--dataset", "digit"], "dataset: 'digit' is unknown"),
        (["--dataset", "folder"], "no default for dataset 'folder', but in_channels is 1; give one value"),
        (["--neuron-backend", "cupy"], "neuron_backend: neuron backend 'cupy' cannot be used: the model is on cpu"),
    ],
)
def test_bad_input_ends_in_one_clear_line(measured, monkeypatch, argv, expected):
    monkeypatch.chdir(ROOT)
    torch.save({"state_dict": fresh_weights(0)}, measured / "plain.pth.tar")
    argv = [word.format(plain=measured / "plain.pth.tar") for word in argv]
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        run(measured, "bad", *argv)
    assert "model sdt" not in str(caught.value)  # what is wrong is a setting


def test_a_folder_that_cannot_be_written_is_told_before_the_evaluation(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("utils.measure.measurement.Measurement.evaluate", lambda self: pytest.fail("it was evaluated"))
    with pytest.raises(UserError, match=r"file/locked cannot be written: Not a directory; choose another --output"):
        run(measured, "locked", "--output", str(tmp_path / "file"))


def test_a_second_run_into_a_folder_keeps_the_first(measured, capsys):
    _, first = run(measured, "twice")
    (measured / "out" / "twice" / "mine.txt").write_text("a note")
    _, second = run(measured, "twice", "--energy-mode", "formula")
    kept = measured / "out" / "twice.1"
    assert json.loads((kept / "report.json").read_text()) == first
    assert (kept / "mine.txt").read_text() == "a note"
    assert second["energy"]["mode"] == "formula"
    assert not (measured / "out" / "twice" / "mine.txt").exists()
    assert f"twice holds an earlier run: it is now {kept}" in capsys.readouterr().out


def test_a_second_run_that_fails_leaves_the_first(measured):
    _, first = run(measured, "kept")
    with pytest.raises(UserError, match=r"missing\.png: no such file"):
        run(measured, "kept", "--attention-map", "missing.png")
    assert json.loads((measured / "out" / "kept" / "report.json").read_text()) == first
    assert not (measured / "out" / "kept.1").exists()


@pytest.mark.parametrize("key", ["resume", "from_rates"])
def test_what_is_read_does_not_lie_where_the_report_is_written(measured, key):
    path = measured / ("a.pth.tar" if key == "resume" else "rates.json")
    place = ["--output", str(measured.parent), "--experiment", measured.name]
    with pytest.raises(UserError, match=f"{key}: .* lies in .*, where the new run begins; choose another"):
        firing_num.main([f"--{key.replace('_', '-')}", str(path), *place])
    assert (measured / "a.pth.tar").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no checkpoint given"),
        (["--from-rates", "x.json", "--energy-mode", "exact"], "needs the spikes"),
        (["--from-rates", "x.json", "--verify"], "verify needs a checkpoint"),
        (["--from-rates", "x.json"], "x.json: no such file"),
    ],
)
def test_without_a_checkpoint(tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(expected)):
        firing_num.main(argv)


def test_a_folder_of_images_at_the_large_size(measured):
    for name in ("a", "b"):
        path = measured / "images" / "validation" / name
        path.mkdir(parents=True)
        Image.effect_noise((330, 340), 80).save(path / "1.png")
    torch.manual_seed(0)
    sizes = dict(num_classes=2, embed_dims=8, num_heads=2, mlp_ratios=2, depths=1, T=3, pooling_stat="1111")
    torch.save({"state_dict": sdt(**sizes).state_dict()}, measured / "large.pth.tar")
    _, report = run(measured, "large", "--dataset", "folder", "--data-dir", str(measured / "images"), "--large-valid",
                    "--resume", str(measured / "large.pth.tar"), "--num-classes", "2", "--in-channels", "3",
                    "--dim", "8", "--layer", "1", "--pooling-stat", "1111", "--img-size", "224")  # fmt: skip
    assert (report["model"]["height"], report["samples"]) == (288, 2)
    assert report["energy"]["layers"][0]["macs_per_step"] == 9 * 288 * 288 * 3


@pytest.mark.parametrize(("events", "treatment"), [(True, "per_step"), (False, "once")])
def test_event_frames_are_charged_at_every_step(measured, monkeypatch, events, treatment):
    """By default; an image, which is the same at each step, is charged once."""
    seen = []
    monkeypatch.setattr(measurement, "account", lambda counts, **options: seen.append(options["first_conv"]))
    here = measurement.Measurement.__new__(measurement.Measurement)
    vars(here).update(cfg=load_yaml(measured / "tiny.yml"), events=events, family=None, cost=COSTS["fp32"])
    here._energy("exact", None, {}, None)
    assert seen == [treatment]


def test_first_conv_once_does_not_fit_events(measured):
    with pytest.raises(UserError, match="differ at every step"):
        run(measured, "events", "--dataset", "gesture", "--num-classes", "11", "--in-channels", "2", "--img-size", "32",
            "--first-conv", "once")  # fmt: skip


def test_published_rates_from_the_command_line(tmp_path, capsys):
    assert (
        firing_num.main(["--from-rates", str(ROOT / "data/paper/table_s1_8_512.json"), "--output", str(tmp_path)]) == 0
    )
    text = capsys.readouterr().out
    for figure in ("4.408", "4.457", "5.352", "published: 4.50 mJ", "41.77"):
        assert figure in text
    report = json.loads((tmp_path / "table_s1_8_512" / "report.json").read_text())
    assert [round(reading["energy_mJ"], 3) for reading in report["readings"]][:2] == [4.457, 4.408]
    with (tmp_path / "table_s1_8_512" / "layers.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 5 + 8 * 7 + 1


def test_a_network_that_is_not_spike_driven_ends_in_status_1(measured, monkeypatch, capsys):
    from utils.measure import verify

    wrong = verify.Verification(2, ["block.0.attn.q_conv"], [], None)
    monkeypatch.setattr(verify, "verify_spike_driven", lambda model, images: wrong)
    status, report = run(measured, "wrong", "--verify")
    assert status == 1
    assert report["verification"]["passed"] is False
    assert "FAILED" in capsys.readouterr().out
