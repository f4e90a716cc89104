"""firing_num.py --compare: each network as it is when it is measured alone, in one table and one picture."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import browser
import pytest
import torch
from measuring import prepare, run

import firing_num
from utils.config.parse import config_from, load_yaml
from utils.errors import UserError
from utils.measure.compared import short_names
from utils.report.comparison import Comparison
from utils.report.figures import _front
from utils.run.build import build_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {"T3": {}, "T1": {"time_steps": 1}, "plif8": {"spike_mode": "plif", "dim": 8, "time_steps": 2}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of training runs, each with a checkpoint and its settings in it, and one that was measured alone."""
    folder = tmp_path_factory.mktemp("compare")
    prepare(folder)
    for seed, (name, changes) in enumerate(NETWORKS.items()):
        cfg = config_from(load_yaml(folder / "tiny.yml").as_dict() | changes)
        torch.manual_seed(seed)
        model = build_model(cfg)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.constant_(module.bias, 0.4)
        (folder / name).mkdir()
        # A setting of the machine it was trained on, one of the training, and one that is no longer known.
        config = cfg.as_dict() | {"device": "cuda", "neuron_backend": "cupy", "mixup": 0.5, "gone": 1}
        torch.save({"state_dict": model.state_dict(), "config": config}, folder / name / "model_best.pth.tar")
    status, _ = run(folder, "alone", "--resume", str(folder / "T1" / "model_best.pth.tar"), "--time-steps", "1")
    assert status == 0
    return folder


def compare(folder, *argv):
    return firing_num.main(["--compare", *argv, "--device", "cpu", "--output", str(folder / "out")])


@pytest.fixture(scope="module")
def compared(trained):
    """One comparison of all of them: its folder, and what was printed."""
    files = [trained / "T3" / "model_best.pth.tar", *(trained / name for name in ("T1", "plif8", "out/alone"))]
    assert compare(trained, *map(str, files)) == 0
    return trained / "out" / "comparison"


@pytest.fixture(scope="module")
def networks(compared):
    return json.loads((compared / "comparison.json").read_text())["networks"]


def test_each_network_has_the_settings_it_was_trained_with(networks):
    assert [(one["name"], one["time_steps"], one["neuron"], one["model"]) for one in networks] == [
        ("T3", 3, "lif", "SDT 2-16"),
        ("T1", 1, "lif", "SDT 2-16"),
        ("plif8", 2, "plif", "SDT 2-8"),
        ("alone", 1, "lif", "SDT 2-16"),
    ]
    assert [one["parameters"] for one in networks][1] == networks[3]["parameters"] > networks[2]["parameters"]


def test_a_comparison_agrees_with_a_measurement_alone(networks, trained):
    _, one, _, report = networks
    apart = ("name", "path", "latency_ms")
    assert {k: v for k, v in one.items() if k not in apart} == {k: v for k, v in report.items() if k not in apart}
    alone = json.loads((trained / "out" / "alone" / "report.json").read_text())
    assert one["energy_mJ"] == alone["energy"]["total_mJ"]
    assert (one["top1_percent"], one["ann_ratio"]) == (alone["top1_percent"], alone["ann_twin"]["ratio"])
    assert one["sha256"] == alone["checkpoint"]["sha256"]
    assert one["latency_ms"] > 0
    assert report["latency_ms"] is None


def test_table_picture_and_page(compared, networks, tmp_path):
    with (compared / "comparison.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], float(row["energy_mJ"])) for row in rows] == [(n["name"], n["energy_mJ"]) for n in networks]
    assert rows[3]["latency_ms"] == ""
    assert {f"{name}_mJ" for name in networks[0]["models_mJ"]} <= set(rows[0])
    assert (compared / "comparison.png").stat().st_size > 5000
    page = (compared / "comparison.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|srcset|href)=["'](?!data:)|https?://|<script|@import|url\(""", page)
    for one in networks:
        assert f">{one['top1_percent']:.2f}<" in page
        assert one["path"] in page


@pytest.mark.skipif(browser.find_browser() is None, reason="there is no Chromium to lay out the page")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows(compared, tmp_path, dark):
    found = browser.layouts([compared / "comparison.html"], (400, 1200), tmp_path, dark=dark)
    assert [(one["width"], one["overflowing"]) for one in found] == [(400, []), (1200, [])]


def test_data_that_are_given_come_before_those_of_the_training(trained, networks):
    assert compare(trained, str(trained / "T1"), "--img-size", "32", "--experiment", "larger") == 0
    (one,) = json.loads((trained / "out" / "larger" / "comparison.json").read_text())["networks"]
    assert one["energy_mJ"] > 2 * networks[1]["energy_mJ"]


def test_what_differs_is_said(trained, networks):
    from utils.measure.compared import Compared

    rows = [Compared(**one) for one in networks[:2]]
    same = Comparison(rows)
    assert not {"data", "first conv"} & set(same.cells()[0])
    assert not any("not comparable" in line for line in same.lines())
    other = Comparison([rows[0], Compared(**networks[1] | {"dataset": "cifar", "incomplete": ["aten.bmm"]})])
    assert "data" in other.cells()[0]
    assert any(line.startswith("not comparable without care: other data") for line in other.lines())
    assert "INCOMPLETE: T1, without aten.bmm" in other.lines()
    assert other.title == "2 networks on digits and cifar"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["missing.pth.tar"], "checkpoint missing.pth.tar: no such file"),
        (["missing.json"], "compare: missing.json: cannot be read (No such file or directory)"),
        (["{folder}"], "has no report.json and no model_best.pth.tar; give a checkpoint"),
        (["{folder}/a.pth.tar"], "a.pth.tar holds no settings (config), as those of train.py do; measure it with"),
        (["{folder}/T1", "{folder}/T1/model_best.pth.tar"], "model_best.pth.tar is given twice"),
        (["{folder}/broken.json"], "broken.json: no JSON"),
        (["{folder}/deep.json"], "deep.json: no JSON"),
        (["{folder}/list.json"], "list.json: no report of a measured checkpoint"),
        ([str(ROOT / "data/paper/table_s1_8_512.json")], "no report of a measured checkpoint (KeyError: 'config')"),
        (["{folder}/out/alone", "--mac-pj", "3"], "report.json: its costs are"),
        (["{folder}/formula.json"], "has no total in mode exact, only in formula, paper; give another --energy-mode"),
        (["{folder}/text.json"], "no report of a measured checkpoint (ValueError: could not convert string to float"),
        (["{folder}/T1", "--time-steps", "2"], "leave out time_steps"),
        (["{folder}/T1", "-c", "{folder}/tiny.yml"], "leave out dim, in_channels, layer"),
        (["{folder}/T1", "--verify"], "verify measures one checkpoint, and compare has several"),
        (["{folder}/T1", "--from-rates", "a.json"], "exclude each other; use resume to measure a checkpoint"),
        (["{folder}/T1", "--dataset", "digit"], "dataset: 'digit' is unknown"),
        (["{folder}/old.pth.tar"], "compare: {folder}/old.pth.tar: time_steps: 0 is not valid"),
    ],
)
def test_bad_input_ends_in_one_clear_message(trained, argv, expected):
    report = json.loads((trained / "out" / "alone" / "report.json").read_text())
    (trained / "broken.json").write_text("{")
    (trained / "deep.json").write_text("[" * 100_000)
    (trained / "list.json").write_text("[1]")
    (trained / "formula.json").write_text(json.dumps(report | {"totals": report["totals"][1:]}))
    (trained / "text.json").write_text(json.dumps(report | {"top1_percent": "high"}))
    torch.save({"state_dict": {}, "config": {"time_steps": 0}}, trained / "old.pth.tar")
    with pytest.raises(UserError, match=re.escape(expected.format(folder=trained))):
        compare(trained, *(word.format(folder=trained) for word in argv), "--experiment", "bad")
    assert not (trained / "out" / "bad").exists()


def test_names_tell_the_networks_apart():
    paths = [Path(p) for p in ("a/model_best.pth.tar", "b/model_best.pth.tar", "b/last.pth.tar", "x/b/last.pth.tar")]
    assert short_names(paths) == ["a", "b/model_best", str(paths[2].absolute()), str(paths[3].absolute())]


def test_the_line_joins_the_networks_that_no_cheaper_one_beats():
    assert _front([(3, 90.0), (1, 80.0), (None, 99.0), (2, 79.0), (1, 70.0), (4, 95.0)]) == [
        (1, 80.0),
        (3, 90.0),
        (4, 95.0),
    ]
