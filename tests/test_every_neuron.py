"""Each neuron that `spike_mode` knows is trained for an epoch on digits, and measured."""

from __future__ import annotations

import json

import processes
import pytest
from tiny import FEW_DIGITS, TINY_RUN

from module.neuron import SPIKE_MODES

pytestmark = pytest.mark.slow

CONFIG = f"{TINY_RUN}epochs: 1\ncooldown_epochs: 0\nopt: adamw\nlr: 5.0e-3\nhflip: 0.0\nworkers: 0\ndevice: cpu\n"
CONFIG += f"train_split_path: {FEW_DIGITS}\n"


def train_and_measure(modes: list[str]) -> int:
    import firing_num
    import train

    return max(
        status
        for mode in modes
        for status in (
            train.main(["-c", "tiny.yml", "--spike-mode", mode, "--experiment", mode]),
            firing_num.main(
                ["-c", "tiny.yml", "--spike-mode", mode, "--resume", f"output/train/{mode}/last.pth.tar",
                 "--val-batch-size", "120"]
            ),
        )
    )  # fmt: skip


def test_every_neuron_trains_and_is_measured(tmp_path):
    (tmp_path / "tiny.yml").write_text(CONFIG)
    modes = list(SPIKE_MODES)
    children = [processes.start(train_and_measure, half, cwd=tmp_path) for half in (modes[::2], modes[1::2])]
    assert processes.finish(*children) == [0, 0], (tmp_path / "output.txt").read_text()
    for mode, neuron in SPIKE_MODES.items():
        report = json.loads((tmp_path / f"output/firing/{mode}/report.json").read_text())
        assert len(report["tensors"]) == 14, mode
        assert all(row["spikes"] == row["nonzero"] for row in report["tensors"]), mode  # 0 or 1
        assert report["energy"]["total_mJ"] > 0, mode
        assert neuron.__name__ in [part["part"] for part in report["parts"]]
