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
        ["--model", "sdt_parallel", "--dataset", "stripes", "--num-classes", "2", "-j", "1"],
    ),
    "model": (["own_model.py"], ["--model", "conv_snn", "--spike-mode", "if"]),
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
    run(processes.firing_num, ["-c", str(folder / "args.yaml"), "--resume", str(folder / "last.pth.tar")], tmp_path)

    with (folder / "summary.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    assert {file.name: file.read_text() for file in (folder / "plugins").glob("*.py")} == {
        plugin: EXAMPLES[plugin] for plugin in plugins
    }
    assert [entry["path"] for entry in read_checkpoint(folder / "last.pth.tar")["plugins"]] == plugins
    report = json.loads((tmp_path / "output" / "firing" / "run" / "report.json").read_text())
    assert report["accuracy"]["samples"] > 100


def run(target, argv, folder):
    child = processes.start(target, argv, cwd=folder)
    text = folder / "output.txt"
    assert processes.finish(child) == [0], text.read_text()
    assert "other plugins" not in text.read_text()
