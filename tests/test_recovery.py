"""A run that is killed anywhere and resumed ends with the bits of one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import processes
import pytest
import torch
from tiny import TINY_RUN, quick

from utils.run.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

TINY = f"""{TINY_RUN}val_batch_size: 120
color_jitter: 0.0
hflip: 0.0
mixup: 0.5
opt: adamw
lr: 5.0e-3
sched: cosine
epochs: 2
cooldown_epochs: 1
model_ema: true
model_ema_decay: 0.9
recovery_interval: 2
checkpoint_hist: 2
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yml").write_text(quick(TINY))
    return tmp_path


def arguments(*more: str) -> list[str]:
    return ["-c", "tiny.yml", "--experiment", "run", "--resume", "auto", "-j", "0", *more]


def run_whole(folder, world_size=1, *more):
    children = [
        processes.start(processes.train, arguments(*more), env=env, cwd=folder)
        for env in (processes.ranks(world_size) if world_size > 1 else [{}])
    ]
    assert processes.finish(*children) == [0] * world_size, (folder / "output.txt").read_text()


def outcome(folder):
    """Everything that must not depend on interruptions."""
    run = folder / "output/train/run"
    last = read_checkpoint(run / "last.pth.tar")
    keys = ("state_dict", "state_dict_ema", "optimizer", "history", "best", "metric")
    kept = {key: last[key] for key in keys} | {"plateau": last.get("plateau")}
    names = sorted(p.name for p in run.glob("*.pth.tar"))
    texts = [(run / name).read_bytes() for name in ("summary.csv", "summary.jsonl")]
    return kept, names, texts, read_checkpoint(run / "model_best.pth.tar")["state_dict"]


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def two_folders(tmp_path):
    folders = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tiny.yml").write_text(quick(TINY))
        folders.append(folder)
    return folders


@pytest.mark.parametrize(("world_size", "seed", "kills"), [(1, 1, 5), (2, 2, 4)])
def test_a_killed_run_ends_like_one_that_was_never_stopped(tmp_path, world_size, seed, kills):
    whole, killed = two_folders(tmp_path)
    # Long enough that no run comes to its end before its last kill.
    size = ["--epochs", "6", "-b", str(48 // world_size)]
    run_whole(whole, world_size, *size)

    draw = random.Random(seed)
    for kill in range(kills):
        # Loader processes must make no difference, nor which process dies.
        argv = arguments(*size, "-j", "2" if kill % 6 == 2 else "0")
        environments = processes.ranks(world_size) if world_size > 1 else [{}]
        victim = kill % world_size
        children = [
            processes.start(processes.train_until, argv, draw.randint(1, 8), env=env, cwd=killed)
            if rank == victim
            else processes.start(processes.train, argv, env=env, cwd=killed)
            for rank, env in enumerate(environments)
        ]
        (code,) = processes.finish(children[victim])
        for child in children:
            child.kill()
        processes.finish(*children)
        assert code == -signal.SIGKILL, (killed / "output.txt").read_text()
    print(f"{kills} kills survived by {world_size} process(es)")
    run_whole(killed, world_size, *size)
    assert_same(outcome(whole), outcome(killed))


VARIANTS = {
    "plateau schedule": ["--sched", "plateau", "--patience-epochs", "0", "--decay-rate", "0.5", "--epochs", "4"],
    "learning rate noise": ["--lr-noise", "0.1", "0.9", "--epochs", "4"],
    "accumulation across the interval": ["--grad-accum-steps", "3", "-b", "24", "--recovery-interval", "2"],
    "mixup that ends": ["--mixup-off-epoch", "1", "--epochs", "3"],
    "lamb, random erasing": ["--opt", "lamb", "--reprob", "0.5"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_run_goes_on_to_the_bit(tmp_path, name):
    whole, killed = two_folders(tmp_path)
    run_whole(whole, 1, *VARIANTS[name])
    for events in (13, 21):
        child = processes.start(processes.train_until, arguments(*VARIANTS[name]), events, cwd=killed)
        assert processes.finish(child) == [-signal.SIGKILL], (killed / "output.txt").read_text()
    run_whole(killed, 1, *VARIANTS[name])
    assert_same(outcome(whole), outcome(killed))


def killed_once(argv: list[str]) -> None:
    """Train; the first time, this process kills itself at its seventh event."""
    if os.environ["RANK"] == "1" and not os.path.exists("was_killed"):
        with open("was_killed", "w"):
            pass
        processes.train_until(argv, 7)
    processes.train(argv)


def test_torchrun_starts_a_killed_pair_again_and_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Through the function that torchrun calls, so that its processes start from the prepared server of these tests."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    whole, killed = two_folders(tmp_path)
    argv = arguments("-b", "24", "--epochs", "1")
    run_whole(whole, 2, "-b", "24", "--epochs", "1")
    port = processes.ranks(1)[0]["MASTER_PORT"]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=2, start_method="forkserver", monitor_interval=0.1,
        rdzv_backend="c10d", rdzv_endpoint=f"127.0.0.1:{port}", run_id="kill",
    )  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    elastic_launch(config, processes.in_folder)(killed_once, argv, str(killed))
    assert (killed / "was_killed").exists()
    assert "resumed output/train/run/" in (killed / "output.txt").read_text()
    assert_same(outcome(whole), outcome(killed))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_in_good_order(folder, number, status):
    child = processes.start(processes.train, arguments("--epochs", "500"), cwd=folder)
    output = folder / "output.txt"
    for _ in range(600):
        if output.exists() and "epoch 1/" in output.read_text():
            break
        time.sleep(0.05)
    assert child.pid is not None
    os.kill(child.pid, number)
    assert processes.finish(child) == [status], output.read_text()
    text = output.read_text()
    assert f"{signal.Signals(number).name}: finishing the step" in text
    assert "continue with the same command and --resume output/train/run/" in text
    assert "Traceback" not in text
    newest = folder / "output/train/run/recovery.pth.tar"
    assert newest.exists() or (folder / "output/train/run/last.pth.tar").exists()


def test_a_torn_checkpoint_is_named_and_an_older_one_taken(finished):
    folder = finished
    run = folder / "output/train/run"
    last = run / "last.pth.tar"
    content = last.read_bytes()
    good = {path.name for path in run.glob("checkpoint-*")}
    last.unlink()  # it shares its bytes with the history
    last.write_bytes(content[: len(content) // 2])
    run_whole(folder, 1, "--epochs", "3")
    text = (folder / "output.txt").read_text()
    assert "last.pth.tar is damaged or no PyTorch file" in text
    assert "an older one is used" in text
    for path in run.glob("*.pth.tar"):
        read_checkpoint(path)  # nothing that was whole was given the torn bytes
    assert good


def test_an_older_checkpoint_of_a_run_cannot_overwrite_the_later_ones(finished):
    folder = finished
    older = min((folder / "output/train/run").glob("checkpoint-*"))
    before = {path: path.read_bytes() for path in older.parent.glob("*.pth.tar")}
    argv = ["-c", "tiny.yml", "--resume", str(older), "-j", "0"]
    if read_checkpoint(older)["epoch"] == 2:
        pytest.skip("the only older checkpoint is the last")
    assert processes.finish(processes.start(processes.train, argv, cwd=folder)) == [2]
    assert "its folder holds a later one (last.pth.tar)" in (folder / "output.txt").read_text()
    assert {path: path.read_bytes() for path in older.parent.glob("*.pth.tar")} == before
    branch = processes.start(processes.train, [*argv, "--experiment", "branch"], cwd=folder)
    assert processes.finish(branch) == [0], (folder / "output.txt").read_text()
    assert (folder / "output/train/branch/model_best.pth.tar").exists()


def test_a_full_disk_leaves_the_previous_checkpoint_whole(finished):
    folder = finished
    before = read_checkpoint(folder / "output/train/run/last.pth.tar")
    child = processes.start(train_on_a_full_disk, cwd=folder)
    assert processes.finish(child) == [2], (folder / "output.txt").read_text()
    text = (folder / "output.txt").read_text()
    assert "train.py: error: cannot write checkpoint output/train/run/" in text
    assert "files written before are untouched" in text
    assert "Traceback" not in text
    assert_same(before["state_dict"], read_checkpoint(folder / "output/train/run/last.pth.tar")["state_dict"])
    assert not list((folder / "output/train/run").glob(".*.pth.tar.*"))


def train_on_a_full_disk() -> None:
    import resource

    # A limit on the size of a file fails writes as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    processes.train(arguments("--epochs", "5"))


def test_a_changed_setting_is_named_on_resume(finished):
    folder = finished
    run_whole(folder, 1, "--epochs", "3", "--lr", "1e-3")
    text = (folder / "output.txt").read_text()
    assert "warning: settings that differ from those in output/train/run/last.pth.tar" in text
    assert "lr was 0.005 and is 0.001" in text
    assert "epochs was 2 and is 3" in text
    # The new ones apply: epoch 3 of 3 of a cosine from 1e-3, then the cool-down at min_lr.
    lines = [json.loads(line) for line in (folder / "output/train/run/summary.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["lr"] == pytest.approx(1e-5)


def test_another_optimizer_is_refused_on_resume(finished):
    folder = finished
    child = processes.start(processes.train, arguments("--opt", "sgd"), cwd=folder)
    assert processes.finish(child) == [2]
    assert "its optimizer is 'adamw', opt is 'sgd'" in (folder / "output.txt").read_text()


def test_a_run_cannot_begin_where_its_first_weights_lie(finished):
    folder = finished
    argv = ["-c", "tiny.yml", "--experiment", "run", "--initial-checkpoint", "output/train/run/last.pth.tar"]
    assert processes.finish(processes.start(processes.train, argv, cwd=folder)) == [2]
    assert "choose another --experiment" in (folder / "output.txt").read_text()
    assert (folder / "output/train/run/last.pth.tar").exists()


def test_recovery_by_another_number_of_processes_is_refused(folder):
    child = processes.start(processes.train_until, arguments(), 5, cwd=folder)
    assert processes.finish(child) == [-signal.SIGKILL]
    assert (folder / "output/train/run/recovery.pth.tar").exists()
    children = [processes.start(processes.train, arguments(), env=env, cwd=folder) for env in processes.ranks(2)]
    assert processes.finish(*children) == [2, 2]
    text = (folder / "output.txt").read_text()
    assert text.count("2 would divide the rest of the data differently") == 1


def test_a_second_start_sets_the_earlier_run_aside(folder):
    argv = [a for a in arguments("--epochs", "1", "--cooldown-epochs", "0") if a not in ("--resume", "auto")]
    for _ in range(2):
        assert processes.finish(processes.start(processes.train, argv, cwd=folder)) == [0]
    runs = folder / "output/train"
    assert sorted(p.name for p in runs.iterdir()) == ["run", "run.1"]
    assert (runs / "run.1/last.pth.tar").exists()
    for run in ("run", "run.1"):
        rows = (runs / run / "summary.csv").read_text().splitlines()
        assert len(rows) == 2
        assert rows[0].startswith("epoch,lr,train_loss")


def test_two_runs_cannot_write_to_one_folder(folder):
    first = processes.start(processes.train, arguments("--epochs", "500"), cwd=folder)
    output = folder / "output.txt"
    for _ in range(600):
        if output.exists() and "files in" in output.read_text():
            break
        time.sleep(0.05)
    second = processes.start(processes.train, arguments(), cwd=folder)
    assert processes.finish(second) == [2]
    first.kill()
    processes.finish(first)
    assert "output folder output/train/run is in use by another run" in output.read_text()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(folder):
    states = []
    for experiment, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        argv = ["-c", "tiny.yml", "--experiment", experiment, "--seed", seed, "-j", "0", "--deterministic"]
        assert processes.finish(processes.start(processes.train, argv, cwd=folder)) == [0]
        states.append(read_checkpoint(folder / f"output/train/{experiment}/last.pth.tar")["state_dict"])
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def train_failing(at: str) -> None:
    """Train, and fail once after the steps of the second epoch."""
    from utils.train import trainer
    from utils.train.run_files import RunLog

    owner, name = {
        "evaluation": (trainer, "evaluate"),
        "row": (RunLog, "epoch"),
        "rate": (trainer, "set_learning_rate"),
    }[at]
    function, calls = getattr(owner, name), 0

    def fails(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == (3 if at == "evaluation" else 2):  # each epoch evaluates the weights and their average
            raise RuntimeError("planted")
        return function(*args, **kwargs)

    setattr(owner, name, fails)
    processes.train(arguments(*AFTER_THE_STEPS))


AFTER_THE_STEPS = ("--sched", "plateau", "--recovery-interval", "0")


def test_what_fails_after_the_last_step_of_an_epoch_costs_no_step(tmp_path):
    for at in ("whole", "evaluation", "rate"):
        folder = tmp_path / at
        folder.mkdir()
        (folder / "tiny.yml").write_text(TINY)
        if at != "whole":
            assert processes.finish(processes.start(train_failing, at, cwd=folder)) == [1]
            assert "the steps of epoch 2 are kept" in (folder / "output.txt").read_text()
        run_whole(folder, 1, *AFTER_THE_STEPS)
        assert at == "whole" or "in epoch 2 after step 5" in (folder / "output.txt").read_text()
        if at != "whole":
            assert_same(outcome(folder), outcome(tmp_path / "whole"))


def test_the_random_kill_test(tmp_path):
    """A round of `python -m tests.kill`."""
    from kill import one_round

    print(one_round(3, tmp_path, most_kills=1))
