"""A checkpoint from before kernels were attached from outside (commit fcc5552) goes on as it did then."""

from __future__ import annotations

import csv

import processes
from golden import GOLDEN

from utils.run.checkpoint import read_checkpoint

OLD = GOLDEN / "old_run"  # a run of two epochs with tiny.yml; the checkpoint after each
EPOCH_2 = {"train_loss": 2.275165415, "eval_loss": 2.311512391, "eval_top1": 10.0}  # of its summary.csv


def test_an_old_checkpoint_resumes_and_ends_where_the_old_run_ended(tmp_path):
    resume = ["-c", str(OLD / "tiny.yml"), "--resume", str(OLD / "checkpoint-0.pth.tar"), "--experiment", "new"]
    child = processes.start(processes.train, [*resume, "--device", "cpu"], cwd=tmp_path)
    assert processes.finish(child) == [0], (tmp_path / "output.txt").read_text()
    run = tmp_path / "output/train/new"
    (row,) = csv.DictReader((run / "summary.csv").read_text().splitlines())
    assert row["epoch"] == "1"
    for name, value in EPOCH_2.items():
        # float32: sums are in another order, and the compiled statistics of BatchNorm are more exact now.
        assert abs(float(row[name]) - value) < 1e-3, name
    paths = (OLD / "checkpoint-0.pth.tar", OLD / "checkpoint-1.pth.tar", run / "checkpoint-1.pth.tar")
    start, then, now = (read_checkpoint(path)["state_dict"] for path in paths)
    assert then.keys() == now.keys()
    # Adam moves a weight whose gradient is rounding alone by the sign of that rounding, so single weights may differ;
    # without the old moments or learning rate all of them would end elsewhere.
    weights = [name for name in then if then[name].is_floating_point() and not name.endswith("conv.bias")]
    apart = sum(float((now[name] - then[name]).square().sum()) for name in weights)
    moved = sum(float((then[name] - start[name]).square().sum()) for name in weights)
    assert apart < 0.02 * moved
    parts = [part[0] for part in read_checkpoint(paths[-1])["parts"]]
    assert parts == ["MS_SPS", "ParametricLIF", "MS_SSA_Conv", "MS_MLP_Conv"]
