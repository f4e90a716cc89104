"""docs/extending.md: each of its files, copied to a folder outside the repository, trains, goes on and is measured."""

from __future__ import annotations

import csv
import json
import re
import shutil

import processes
import pytest
from processes import ROOT
from tiny import TINY_RUN

from utils.run.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

EXAMPLES = {file.name: file.read_text() for file in sorted((ROOT / "examples").glob("*.py"))}
PAGE = (ROOT / "docs" / "extending.md").read_text()

# Name of a run -> its plugins, and the options that choose what they define.
RUNS = {
    "neuron and attention": (
        ["psn_neuron.py", "own_attention.py"],
        ["--spike-mode", "psn", "--neuron-args", "T=2", "--model", "sdt_key_mask", "--model-ema"],
    ),
    "block and data set": (
        ["own_block.py", "own_dataset.py"],
        ["--model", "sdt_parallel", "--dataset", "stripes", "--num-classes", "2"],
    ),
    "model": (["own_model.py"], ["--model", "conv_snn", "--spike-mode", "if"]),
}
# Spike tensors of these parts that a report must have.
SPIKES = {
    "neuron and attention": {"MS_SPS_lif", "MS_MLP_Conv0_fc1_lif", "head_lif"},
    "block and data set": {"block0_attn_q_lif", "block0_mlp_fc2_lif"},
    "model": {"lif1", "lif2"},
}


def test_the_page_shows_each_file_as_it_is_and_no_other_code():
    assert re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) == [
        EXAMPLES[name]
        for name in ("psn_neuron.py", "own_attention.py", "own_block.py", "own_model.py", "own_dataset.py")
    ]


def test_each_file_is_short_and_is_run_below():
    assert {name for name, text in EXAMPLES.items() if len(text.splitlines()) > 30} == set()
    assert sorted(name for plugins, _ in RUNS.values() for name in plugins) == sorted(EXAMPLES)


def test_each_command_of_the_page_is_valid(monkeypatch):
    from utils.config.parse import parse_config

    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^python train\.py (-c conf.*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        (plugin,) = parse_config(command.split(), prog="train.py", description="").plugin
        assert (ROOT / plugin).is_file()


@pytest.mark.parametrize("name", RUNS)
def test_parts_from_a_folder_elsewhere_train_go_on_and_are_measured(name, tmp_path):
    plugins, options = RUNS[name]
    for plugin in plugins:
        shutil.copy(ROOT / "examples" / plugin, tmp_path)
    (tmp_path / "some.txt").write_text("\n".join(map(str, range(480))))
    own = "train_split_path: some.txt\nworkers: 0\ndevice: cpu\nhflip: 0\nval_batch_size: 180\ncooldown_epochs: 0\n"
    (tmp_path / "a.yml").write_text(f"{TINY_RUN}{own}plugin: {json.dumps(plugins)}\n")
    argv = ["-c", "a.yml", "--experiment", "run", *options]
    run(processes.train, [*argv, "--epochs", "1"], tmp_path)
    run(processes.train, [*argv, "--epochs", "2", "--resume", "auto"], tmp_path)
    folder = tmp_path / "output" / "train" / "run"
    measure = ["-c", str(folder / "args.yaml"), "--resume", str(folder / "last.pth.tar")]
    assert "other plugins" not in run(processes.firing_num, measure, tmp_path)

    with (folder / "summary.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    assert {file.name: file.read_text() for file in (folder / "plugins").glob("*.py")} == {
        plugin: EXAMPLES[plugin] for plugin in plugins
    }
    assert [entry["path"] for entry in read_checkpoint(folder / "last.pth.tar")["plugins"]] == plugins
    report = json.loads((tmp_path / "output" / "firing" / "run" / "report.json").read_text())
    assert report["samples"] > 100
    assert {tensor["name"] for tensor in report["tensors"]} >= SPIKES[name]


def test_a_changed_plugin_is_told_and_a_broken_one_leaves_everything_as_it_was(tmp_path):
    text = EXAMPLES["own_model.py"]
    (tmp_path / "own_model.py").write_text(text)
    (tmp_path / "a.yml").write_text(f"{TINY_RUN}workers: 0\ndevice: cpu\nhflip: 0\nplugin: own_model.py\n")
    argv = ["-c", "a.yml", "--model", "conv_snn", "--experiment", "run", "--resume", "auto", "--cooldown-epochs", "0"]
    run(processes.train, [*argv, "--epochs", "1"], tmp_path)
    folder = tmp_path / "output" / "train" / "run"
    files = sorted(file.name for file in folder.iterdir())
    (tmp_path / "own_model.py").write_text(text + "def (\n")
    line = len(text.splitlines()) + 1
    assert f"own_model.py:{line}: invalid syntax\n" in run(processes.train, argv[:-2], tmp_path, status=2)
    assert sorted(file.name for file in folder.iterdir()) == files

    (tmp_path / "own_model.py").write_text(text + "# changed\n")
    said = run(processes.train, [*argv, "--epochs", "2"], tmp_path)
    assert said.count("warning: other plugins than in output/train/run/last.pth.tar: own_model.py was SHA-256 ") == 1
    assert len(list((folder / "plugins").glob("own_model*.py"))) == 2


def run(target, argv, folder, status=0):
    """What the program said."""
    child = processes.start(target, argv, cwd=folder)
    text = folder / "output.txt"
    assert processes.finish(child) == [status], text.read_text()
    return text.read_text()
