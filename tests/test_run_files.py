"""The files of a run: each epoch once in the summaries, and recovery checkpoints at their interval."""

from __future__ import annotations

import json

import pytest
import torch

from utils.config.parse import config_from
from utils.run.distributed import Process
from utils.train.recovery import Recovery
from utils.train.run_files import SUMMARY, SUMMARY_LINES, RunLog
from utils.train.step import EpochSums


def lines(folder):
    return (folder / SUMMARY).read_text().splitlines(), (folder / SUMMARY_LINES).read_text().splitlines()


def test_a_resumed_run_writes_each_epoch_once(tmp_path):
    def epochs(start, stop):
        log = RunLog(tmp_path, config_from({}), start)
        for epoch in range(start, stop):
            log.epoch({"epoch": epoch, "lr": 0.5 / (start + 1)}, {})
        log.close()

    epochs(0, 3)
    for name in (SUMMARY, SUMMARY_LINES):  # a process that was killed while it wrote
        with (tmp_path / name).open("a") as file:
            file.write("3,0.2" if name == SUMMARY else '{"epoch": 1, "lr": 9}')
    epochs(2, 4)
    table, objects = lines(tmp_path)
    rates = [0.5, 0.5, 0.5 / 3, 0.5 / 3]
    assert table[0] == "epoch,lr"
    assert [int(line.split(",")[0]) for line in table[1:]] == [0, 1, 2, 3]
    assert [float(line.split(",")[1]) for line in table[1:]] == pytest.approx(rates)
    assert [json.loads(line) for line in objects] == [{"epoch": i, "lr": rate} for i, rate in enumerate(rates)]
    epochs(0, 1)
    table, objects = lines(tmp_path)
    assert (len(table), len(objects)) == (2, 1)


@pytest.mark.parametrize(("interval", "group", "due"), [(3, 1, [3, 6]), (3, 2, [4, 6]), (0, 1, [])])
def test_recovery_checkpoints_come_at_multiples_of_the_interval(monkeypatch, interval, group, due):
    """Steps come in groups where gradients are accumulated."""
    recovery = Recovery(config_from({"recovery_interval": interval}), Process(0, 1, torch.device("cpu")), None, None)
    saved = []
    monkeypatch.setattr(recovery, "save", lambda epoch, sums: saved.append((epoch, sums.steps)))
    for epoch in (0, 1):
        for steps in range(0, 8, group):
            recovery.between_steps(epoch, EpochSums(torch.device("cpu"), steps))
    assert saved == [(epoch, steps) for epoch in (0, 1) for steps in due]
