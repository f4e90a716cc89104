"""A process of the run, or one that loads samples, is killed; a sample turns out to be damaged: nothing is lost."""

from __future__ import annotations

import os
import signal

import processes
import pytest
import torch.distributed as dist
from test_recovery import TINY, arguments, assert_same, outcome
from tiny import quick

from utils.run.checkpoint import read_checkpoint
from utils.run.distributed import _failures
from utils.run.faults import ended_worker, lost_partner

pytestmark = pytest.mark.slow

# Digits, of which one cannot be read, or ends the process that reads it, as long as a file `trouble` exists.
PLUGIN = """
import os, signal
from pathlib import Path
from utils.data.datasets import DATASETS, DIGITS
from utils.data.register import register_dataset
from utils.data.images import DigitsDataset
from utils.errors import UserError
from utils.events.digits import DIGITS_FILE

class Digits:
    def __init__(self, cfg, training):
        self.whole, self.training = DigitsDataset(DIGITS_FILE, train=training), training

    def __len__(self):
        return 240

    def __getitem__(self, index):
        trouble = Path("trouble").read_text() if Path("trouble").exists() else ""
        if trouble == "killed" and index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "damaged" and not self.training and index == 200:
            raise UserError("data_dir: sample 200 is damaged; replace or remove it")
        return self.whole[index]

register_dataset("fragile", Digits, classes=10, input_size=(1, 8, 8))
"""
ARGUMENTS = ["--plugin", "fragile.py", "--dataset", "fragile", "--train-split-path", ""]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yml").write_text(quick(TINY))
    (tmp_path / "fragile.py").write_text(PLUGIN)
    return tmp_path


def said(folder):
    return (folder / "output.txt").read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_the_partner_of_a_killed_process_says_so_in_one_line(folder, victim):
    children = [
        processes.start(processes.train_until, arguments("-b", "24"), 6, env=env, cwd=folder)
        if rank == victim
        else processes.start(processes.train, arguments("-b", "24"), env=env, cwd=folder)
        for rank, env in enumerate(processes.ranks(2))
    ]
    codes = processes.finish(*children)
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 2), said(folder)
    assert said(folder).count("train.py: error: another process of the run has ended without a message") == 1
    assert "continue with the same command and --resume auto" in said(folder)
    assert "Traceback" not in said(folder)


def test_a_store_that_is_gone_is_told_without_torchs_stack_frames(capfd):
    [env, _] = processes.ranks(2)
    address = ("127.0.0.1", int(env["MASTER_PORT"]))
    server = dist.TCPStore(*address, is_master=True, wait_for_workers=False)
    store = dist.TCPStore(*address, is_master=False)
    assert _failures(store, 1) == 1
    del server
    assert _failures(store, 1) is None
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_a_killed_loader_process_is_one_line_with_the_remedy(folder):
    (folder / "trouble").write_text("killed")
    child = processes.start(processes.train, arguments(*ARGUMENTS, "-j", "1"), cwd=folder)
    assert processes.finish(child) == [2], said(folder)
    assert said(folder).count("train.py: error: workers: a process that loads samples ") == 1
    assert "use fewer --workers or a smaller --batch-size" in said(folder)
    assert "Traceback" not in said(folder)


def test_an_epoch_is_kept_when_its_evaluation_fails(folder, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("tiny.yml", "fragile.py"):
        (whole / name).write_text((folder / name).read_text())
    argv = arguments(*ARGUMENTS, "--epochs", "1", "--cooldown-epochs", "0", "--recovery-interval", "0")
    assert processes.finish(processes.start(processes.train, argv, cwd=whole)) == [0], said(whole)
    (folder / "trouble").write_text("damaged")
    assert processes.finish(processes.start(processes.train, argv, cwd=folder)) == [2], said(folder)
    assert "train.py: error: data_dir: sample 200 is damaged; replace or remove it" in said(folder)
    recovery = read_checkpoint(folder / "output/train/run/recovery.pth.tar")
    assert recovery["progress"]["steps"] == 5  # all of the epoch
    (folder / "trouble").unlink()
    assert processes.finish(processes.start(processes.train, argv, cwd=folder)) == [0], said(folder)
    assert "in epoch 1 after step 5" in said(folder)
    assert_same(outcome(whole), outcome(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.csv", None),
        ("summary.csv", b"\xff\xfe\x00garbage\n1,2\n"),
        ("summary.csv", b"epoch,lr\n" + b"9" * 5000 + b",1\n"),
        ("summary.jsonl", b'[]\n{}\n{"epoch": null}\n{"epoch": 1e999}\n' + b"[" * 10**5 + b"\n"),
    ],
)
def test_a_finished_run_needs_no_summary(folder, finished, name, content):
    path = finished / "output/train/run" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert processes.finish(processes.start(processes.train, arguments(), cwd=finished)) == [0], said(finished)
    assert "Traceback" not in said(finished)
    assert "nothing left to do" in said(finished)
    if name == "summary.csv":
        assert "no curves: output/train/run/summary.csv does not " in said(finished)


@pytest.mark.parametrize("name", ["log.txt", "summary.csv", "args.yaml", "plugins"])
def test_a_folder_in_the_place_of_a_file_is_named(finished, name):
    path = finished / "output/train/run" / name
    path.unlink(missing_ok=True)
    if name == "plugins":
        path.write_text("a file in the place of a folder")
    else:
        path.mkdir()
    (finished / "own.py").write_text("")
    argv = arguments("--epochs", "3", "--plugin", "own.py")
    assert processes.finish(processes.start(processes.train, argv, cwd=finished)) == [2], said(finished)
    assert f"output/train/run/{name}" in said(finished).splitlines()[-1]
    assert said(finished).splitlines()[-1].startswith("train.py: error: ")
    assert "Traceback" not in said(finished)


def test_only_errors_of_lost_processes_are_taken_for_those():
    lost = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"
    assert "was killed" in str(lost_partner(RuntimeError(lost)))
    assert lost_partner(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None
    assert lost_partner(ValueError(lost)) is None
    killed = "DataLoader worker (pid 41) is killed by signal: Killed. "
    assert "(pid 41) was killed" in str(ended_worker(RuntimeError(killed)))
    assert "(pid 41, 42)" in str(ended_worker(RuntimeError("DataLoader worker (pid(s) 41, 42) exited unexpectedly")))
    full = "DataLoader worker (pid 41) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory."  # noqa: E501
    assert "make /dev/shm larger" in str(ended_worker(RuntimeError(full)))
    assert ended_worker(RuntimeError("no worker")) is None


def test_what_a_kill_in_the_first_save_leaves_is_deleted(folder):
    """Also where there is no checkpoint to go on from."""
    assert processes.finish(processes.start(processes.train_until, arguments(), 1, cwd=folder)) == [-signal.SIGKILL]
    run = folder / "output/train/run"
    assert any(name.endswith(".partial") for name in os.listdir(run)), os.listdir(run)
    assert processes.finish(processes.start(processes.train, arguments("--epochs", "1"), cwd=folder)) == [0]
    assert not [name for name in os.listdir(run) if name.endswith(".partial")]
