"""firing_num.py from the command line to its files."""

from __future__ import annotations

import csv
import errno
import html
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import firing_num
from model import sdt
from utils.config.parse import load_yaml
from utils.data.facts import DataSettings
from utils.data.loaders import build_eval_loader
from utils.errors import UserError
from utils.measure import measurement
from utils.measure.attention_map import attention_maps
from utils.measure.energy import COSTS
from utils.report.attention_picture import to_pictures
from utils.report.rates import RatesReport
from utils.run.models import create_model

ROOT = Path(__file__).resolve().parent.parent
TINY = """
dataset: digits
num_classes: 10
in_channels: 1
img_size: 16
layer: 2
dim: 16
num_heads: 2
mlp_ratio: 2
time_steps: 3
pooling_stat: "0011"
val_batch_size: 100
workers: 0
"""


def fresh_weights(seed):
    torch.manual_seed(seed)
    model = sdt(img_size=16, in_channels=1, num_classes=10, embed_dims=16, num_heads=2, mlp_ratios=2,
                                   depths=2, T=3, pooling_stat="0011")  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, 0.4)
    return model.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    (path / "tiny.yml").write_text(TINY)
    torch.save({"state_dict": fresh_weights(0), "state_dict_ema": fresh_weights(1), "epoch": 3}, path / "a.pth.tar")
    return path


def run(folder, name, *argv):
    """Run in this process; status, and report.json."""
    words = ["-c", str(folder / "tiny.yml"), "--resume", str(folder / "a.pth.tar"), "--device", "cpu"]
    status = firing_num.main([*words, "--output", str(folder / "out"), "--experiment", name, *argv])
    return status, json.loads((folder / "out" / name / "report.json").read_text())


@pytest.fixture(scope="module")
def full(folder):
    """One run with everything on."""
    status, report = run(folder, "full", "--verify", "--attention-map", "2", "--sweep-T", "1", "4",
                         "--energy-extras", "neurons", "memory")  # fmt: skip
    assert status == 0
    return report, folder / "out" / "full"


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


def test_the_report_has_the_accuracy_and_rates_of_the_model(folder, full):
    """Computed once more, from the model's own hook; float32 in other batches may flip a spike or two."""
    report, _ = full
    cfg = load_yaml(folder / "tiny.yml")
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


def test_the_sweep_agrees_with_a_run_at_that_t(folder, full):
    report, _ = full
    _, alone = run(folder, "four", "--time-steps", "4")
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


def test_the_page_needs_nothing_else(full):
    report, folder = full
    page = (folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|https?://|<script|@import|url\(""", page)
    assert page.count("<img") == 1
    assert f"{report['top1_percent']:.2f}%" in page
    assert "not measured power" in page
    assert "prefers-color-scheme: dark" in page
    for name in ("block 2 V_S", "head_lif", r"\begin{tabular}", "| model | T |"):
        assert name in page
    tags = re.findall(r"<(/?)(section|div|table|tr|td|span|details|pre|p)\b", page)
    for tag in {tag for _, tag in tags}:
        assert tags.count(("", tag)) == tags.count(("/", tag)), tag


def test_the_page_has_the_tables_of_the_terminal(folder, capsys):
    run(folder, "tables", "--sweep-T", "1")
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    page = html.unescape((folder / "out" / "tables" / "report.html").read_text())
    tables = [
        [" ".join(re.sub("<.*?>", " ", row).split()) for row in re.findall("<tr>(.*?)</tr>", table)]
        for table in re.findall("<table>(.*?)</table>", page, re.DOTALL)
    ]
    *numbers, _ = tables  # the last one says what was measured
    assert [len(rows) for rows in numbers] == [1 + 3, 1 + 5 + 2 * 7 + 1, 1 + 4 + 2 * 9 + 1, 1 + 1, 1 + 4]
    assert [row for rows in numbers for row in rows if row not in shown] == []


def test_how_each_part_ran_is_told(folder, capsys):
    _, found = run(folder, "parts", "--kernels", "plain")
    parts = [tuple(row.values()) for row in found["parts"]]
    assert ("MS_SSA_Conv", 2, "plain", "kernels: plain") in parts
    assert [name for name, _, runs_as, _ in parts if runs_as == "SpikingJelly's torch code"] == ["LIF"]
    assert "How each part ran" in capsys.readouterr().out
    page = html.unescape((folder / "out" / "parts" / "report.html").read_text())
    assert all("".join(f"<td>{cell}</td>" for cell in part) in page for part in parts)


def test_a_report_is_a_file_of_rates(full):
    report, folder = full
    again = RatesReport(str(folder / "report.json"), COSTS["fp32"])
    (paper,) = (total for total in report["totals"] if total["mode"] == "paper")
    assert again.chosen.total_mJ == pytest.approx(paper["energy_mJ"], rel=1e-12)


def test_moving_average_weights_on_request(folder, full):
    """They are those of a checkpoint that has nothing else."""
    report, _ = full
    torch.save({"state_dict": fresh_weights(1)}, folder / "average.pth.tar")
    _, averaged = run(folder, "ema", "--use-ema")
    _, alone = run(folder, "average", "--resume", str(folder / "average.pth.tar"))
    assert averaged["tensors"] == alone["tensors"]
    assert averaged["tensors"] != report["tensors"]


@pytest.mark.parametrize("mode", ["formula", "paper"])
def test_other_modes_agree_with_the_exact_run(folder, full, mode):
    report, _ = full
    _, other = run(folder, mode, "--energy-mode", mode)
    (expected,) = (total["energy_mJ"] for total in report["totals"] if total["mode"] == mode)
    assert other["energy"]["mode"] == mode
    assert other["energy"]["total_mJ"] == pytest.approx(expected, rel=1e-12)


def test_batches_and_tet_do_not_change_the_result(folder, full):
    report, _ = full
    _, other = run(folder, "batches", "-b", "77", "--TET")
    # Counts are exact; but float32 sums in another order with another batch size, which can flip a spike or two.
    for row, again in zip(report["tensors"], other["tensors"], strict=True):
        assert row["elements_per_step"] == again["elements_per_step"]
        assert row["mean_rate"] == pytest.approx(again["mean_rate"], rel=2e-3)
    assert other["energy"]["total_mJ"] == pytest.approx(report["energy"]["total_mJ"], rel=2e-3)
    assert other["top1_percent"] == pytest.approx(report["top1_percent"], abs=0.6)


def test_own_costs(folder):
    _, report = run(folder, "own", "--mac-pj", "10", "--ac-pj", "2", "--first-conv", "per_step", "--ann-attention",
                    "paper", "--img-size", "32")  # fmt: skip
    layers = report["energy"]["layers"]
    assert layers[0]["energy_pJ"] == pytest.approx(10 * layers[0]["exact_operations"])
    assert layers[1]["energy_pJ"] == pytest.approx(2 * layers[1]["exact_operations"])
    assert report["ann_twin"]["attention"] == "paper"
    assert report["model"]["height"] == 32
    assert report["energy"]["cost"]["name"] == "own costs"


def test_attention_maps_of_image_files(folder, full):
    for name in ("one.png", "two.png"):
        Image.new("RGB", (40, 30), (200, 30, 90)).save(folder / name)
    _, report = run(folder, "files", "--attention-map", str(folder / "one.png"), str(folder / "two.png"))
    assert report["attention_maps"] == ["attention.png"]
    with Image.open(folder / "out" / "files" / "attention.png") as picture:
        assert picture.width > picture.height


def test_attention_maps_are_mean_rates_per_token():
    model = sdt(img_size=16, in_channels=1, num_classes=10, embed_dims=16, num_heads=2, depths=2, T=3,
                                   pooling_stat="0001")  # fmt: skip
    weights = {k: v for k, v in fresh_weights(0).items() if v.shape == model.state_dict()[k].shape}
    model.load_state_dict(weights, strict=False)
    x = torch.randn(2, 1, 16, 16)
    maps = attention_maps(model.eval(), x)
    assert maps.vs.shape == maps.masked.shape == (2, 2, 8, 8)
    with torch.no_grad():
        _, hook = model(x, hook={})
    for block in range(2):
        q = hook[f"MS_SSA_Conv{block}_q_lif"]  # [T, B, D, H', W']
        torch.testing.assert_close(maps.vs[block], q.mean(dim=(0, 2)))
        assert bool((maps.masked[block] <= maps.vs[block] + 1e-6).all())  # the mask only takes away
    assert float(maps.vs.max()) > 0


def test_events_below_an_attention_map_have_the_colours_of_other_pictures():
    frames = torch.zeros(2, 3, 2, 4, 4)  # [B, T, C, H, W]
    frames[0, :, 0, 0, 0] = 2.0  # OFF
    frames[1, 1, 1, 0, 0] = 5.0  # ON
    pictures = (to_pictures(frames, DataSettings((2, 4, 4), (2, 4, 4), (0, 0), (1, 1), "", 1.0, False)) * 255).round()
    assert pictures.shape == (2, 4, 4, 3)
    assert pictures[:, 0, 0].tolist() == [[213, 94, 0], [0, 114, 178]]
    assert bool((pictures[:, 1:] == 255).all())


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
def test_bad_input_ends_in_one_clear_line(folder, monkeypatch, argv, expected):
    monkeypatch.chdir(ROOT)
    torch.save({"state_dict": fresh_weights(0)}, folder / "plain.pth.tar")
    argv = [word.format(plain=folder / "plain.pth.tar") for word in argv]
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        run(folder, "bad", *argv)
    assert "model sdt" not in str(caught.value)  # what is wrong is a setting


def test_a_folder_that_cannot_be_written_is_told_before_the_evaluation(folder, monkeypatch):
    def forbidden(**kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(firing_num.tempfile, "TemporaryFile", forbidden)
    monkeypatch.setattr("utils.measure.measurement.Measurement.evaluate", lambda self: pytest.fail("it was evaluated"))
    with pytest.raises(UserError, match=r"out/locked cannot be written: Permission denied; choose another --output"):
        run(folder, "locked")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no checkpoint given"),
        (["--from-rates", "x.json", "--energy-mode", "exact"], "needs the spikes"),
        (["--from-rates", "x.json", "--verify"], "verify needs a checkpoint"),
        (["--from-rates", "x.json"], "cannot be read"),
    ],
)
def test_without_a_checkpoint(tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(expected)):
        firing_num.main(argv)


def test_a_folder_of_images_at_the_large_size(folder):
    for name in ("a", "b"):
        path = folder / "images" / "validation" / name
        path.mkdir(parents=True)
        Image.effect_noise((330, 340), 80).save(path / "1.png")
    torch.manual_seed(0)
    sizes = dict(num_classes=2, embed_dims=8, num_heads=2, mlp_ratios=2, depths=1, T=3, pooling_stat="1111")
    torch.save({"state_dict": sdt(**sizes).state_dict()}, folder / "large.pth.tar")
    _, report = run(folder, "large", "--dataset", "folder", "--data-dir", str(folder / "images"), "--large-valid",
                    "--resume", str(folder / "large.pth.tar"), "--num-classes", "2", "--in-channels", "3", "--dim", "8",
                    "--layer", "1", "--pooling-stat", "1111", "--img-size", "224")  # fmt: skip
    assert (report["model"]["height"], report["samples"]) == (288, 2)
    assert report["energy"]["layers"][0]["macs_per_step"] == 9 * 288 * 288 * 3


@pytest.mark.parametrize(("events", "treatment"), [(True, "per_step"), (False, "once")])
def test_event_frames_are_charged_at_every_step(folder, monkeypatch, events, treatment):
    """By default; an image, which is the same at each step, is charged once."""
    seen = []
    monkeypatch.setattr(measurement, "account", lambda counts, **options: seen.append(options["first_conv"]))
    here = measurement.Measurement.__new__(measurement.Measurement)
    vars(here).update(cfg=load_yaml(folder / "tiny.yml"), events=events, family=None, cost=COSTS["fp32"])
    here._energy("exact", None, {}, None)
    assert seen == [treatment]


def test_first_conv_once_does_not_fit_events(folder):
    with pytest.raises(UserError, match="differ at every step"):
        run(folder, "events", "--dataset", "gesture", "--num-classes", "11", "--in-channels", "2", "--img-size", "32",
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


def test_a_network_that_is_not_spike_driven_ends_in_status_1(folder, monkeypatch, capsys):
    from utils.measure import verify

    wrong = verify.Verification(2, ["block.0.attn.q_conv"], [], None)
    monkeypatch.setattr(verify, "verify_spike_driven", lambda model, images: wrong)
    status, report = run(folder, "wrong", "--verify")
    assert status == 1
    assert report["verification"]["passed"] is False
    assert "FAILED" in capsys.readouterr().out
