"""The embedded event set from nothing to a trained model, in the event mode and with TET."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_small_model_learns_simulated_events_without_a_download(tmp_path: Path) -> None:
    words = "train.py -c conf/digits-dvs/1_64_12E_t5_TET.yml --epochs 5 --warmup-epochs 1 --lr 1e-2"
    sizes = [
        "--time-steps",
        "3",
        "--dim",
        "32",
        "--num-heads",
        "4",
        "--img-size",
        "16",
        "--pooling-stat",
        "0011",
        "--device",
        "cpu",
    ]
    places = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path), "--experiment", "run"]
    done = subprocess.run(
        [sys.executable, *words.split(), *sizes, *places],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "summary.csv").open() as file:
        accuracies = [float(row["eval_top1"]) for row in csv.DictReader(file)]
    # 72% where this was written; chance is 10%.
    assert accuracies[-1] > 40
    assert 'split_hash: "' in (tmp_path / "run" / "args.yaml").read_text()
