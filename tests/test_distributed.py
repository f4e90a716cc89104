"""Launchers, and results that do not depend on the number of processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import processes
import pytest
import torch
from test_recovery import TINY

from utils.errors import UserError
from utils.run import distributed
from utils.run.checkpoint import read_checkpoint
from utils.run.distributed import Place, choose_device, find_place

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yml").write_text(TINY)
    return tmp_path


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, *(n for n in os.environ if n.startswith("SLURM_"))):
        # Set first, so that what the code under test sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def in_all_ranks(folder, target, argv, world_size, **more):
    environments = processes.ranks(world_size) if world_size > 1 else [{}]
    children = [processes.start(target, argv, env=env | more, cwd=folder) for env in environments]
    return processes.finish(*children)


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"],
    "torch.distributed.launch": ["-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port={port}"],
}


@pytest.mark.parametrize("launcher", ["torchrun", "torch.distributed.launch"])
def test_a_launcher_starts_two_processes_on_a_cpu(folder, launcher):
    port = processes.ranks(1)[0]["MASTER_PORT"]
    words = [word.format(port=port) for word in LAUNCHERS[launcher]]
    arguments = ["-c", "tiny.yml", "--experiment", "run", "-j", "0", "--epochs", "1", "--cooldown-epochs", "0"]
    done = subprocess.run(
        [sys.executable, *words, str(processes.ROOT / "train.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 process(es) on cpu") == 1
    assert done.stdout.count("epoch 1/1") == 1


@pytest.mark.parametrize("option", ["--local-rank=0", "--local_rank=0"])
def test_the_option_of_old_launchers_is_taken(folder, option):
    argv = ["-c", "tiny.yml", option, "--experiment", "run", "--epochs", "1", "--cooldown-epochs", "0", "-j", "0"]
    assert in_all_ranks(folder, processes.train, argv, 1) == [0]


def test_two_nodes_by_rendezvous(folder):
    port = processes.ranks(1)[0]["MASTER_PORT"]
    arguments = ["-c", "tiny.yml", "--experiment", "run", "-j", "0", "--epochs", "1", "--cooldown-epochs", "0"]
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
                *("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--max-restarts=1"),
                *(f"--rdzv_conf=is_host={int(first)}", str(processes.ROOT / "train.py"), *arguments),
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for first in (True, False)
    ]
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert sum(text.count("2 process(es) on cpu") for text in texts) == 1


def test_evaluation_and_firing_rates_are_the_same_with_1_2_and_3_processes(folder):
    argv = ["-c", "tiny.yml", "--experiment", "run", "-j", "0", "--epochs", "1", "--cooldown-epochs", "0"]
    assert in_all_ranks(folder, processes.train, argv, 1) == [0]
    results = []
    for world_size in (1, 2, 3):
        argv = ["-c", "tiny.yml", "--resume", "output/train/run/last.pth.tar", "-j", "0", "--batch-size", "50"]
        argv += ["--output", f"firing{world_size}"]
        assert in_all_ranks(folder, processes.firing_num, argv, world_size) == [0] * world_size
        tables = []
        for name in ("firing.csv", "layers.csv"):
            with next((folder / f"firing{world_size}").rglob(name)).open() as file:
                tables += list(csv.reader(file))
        results.append(tables)
    assert len(results[0]) > 10
    assert results[0] == results[1] == results[2]
    top1 = [line.split("top-1 ")[1].split("%")[0] for line in (folder / "output.txt").read_text().splitlines()
            if "360 samples" in line]  # fmt: skip
    assert len(top1) == 3
    assert len(set(top1)) == 1


def test_two_processes_with_shared_statistics_log_the_losses_of_one(folder):
    argv = ["-c", "tiny.yml", "-j", "0", "--epochs", "1", "--cooldown-epochs", "0", "--mixup", "0", "--sync-bn"]
    assert in_all_ranks(folder, processes.train, [*argv, "--experiment", "two", "-b", "120"], 2) == [0, 0]
    assert in_all_ranks(folder, processes.train, [*argv, "--experiment", "one", "-b", "240"], 1) == [0]
    rows = []
    for name in ("one", "two"):
        with (folder / f"output/train/{name}/summary.csv").open() as file:
            rows.append({key: float(value) for key, value in next(csv.DictReader(file)).items()})
    # Float32 sums in another order can flip a spike near its threshold; a loss of one rank's half would be off by
    # several percent.
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-3)
    assert rows[0]["eval_loss"] == pytest.approx(rows[1]["eval_loss"], rel=1e-2)


def average_of_each_rank(argv: list[str]) -> None:
    """Train and evaluate one epoch, and write this process's moving average."""
    from pathlib import Path

    import model  # noqa: F401 -- registers the models
    from utils.config.parse import parse_config
    from utils.train.trainer import Trainer

    cfg = parse_config(argv, prog="train.py", description="")
    with distributed.distributed(cfg) as process:
        folder = Path(f"rank{process.rank}")
        folder.mkdir()
        trainer = Trainer(cfg, process, folder)
        with trainer.files():
            trainer.train(0)
            trainer.evaluate(0)
        assert trainer.state.ema is not None
        torch.save(trainer.state.ema.module.state_dict(), folder / "ema.pth")


def test_the_moving_average_is_the_same_in_all_processes(folder):
    argv = ["-c", "tiny.yml", "-j", "0", "-b", "120"]
    assert in_all_ranks(folder, average_of_each_rank, argv, 2) == [0, 0], (folder / "output.txt").read_text()
    first, second = (read_checkpoint(folder / f"rank{rank}/ema.pth") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (folder / "rank1/last.pth.tar").exists()
    assert sorted(p.name for p in (folder / "rank1").iterdir()) == ["ema.pth"]  # files are rank 0's


def test_an_error_of_all_processes_is_shown_once(folder):
    argv = ["-c", "tiny.yml", "--initial-checkpoint", "missing.pth", "--experiment", "run"]
    assert in_all_ranks(folder, processes.train, argv, 2) == [2, 2]
    text = (folder / "output.txt").read_text()
    assert text.count("missing.pth: no such file") == 1
    assert "Traceback" not in text


def test_a_wrong_setting_is_shown_once(folder):
    assert in_all_ranks(folder, processes.train, ["-c", "tiny.yml", "--dmi", "3"], 2) == [2, 2]
    assert (folder / "output.txt").read_text().count("--dmi: unknown option; did you mean --dim?") == 1


def test_without_a_launcher_there_is_one_process(no_launcher):
    assert find_place() == Place(0, 1, 0, 1)


def test_a_slurm_step_is_a_launcher(no_launcher):
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "gpu[07-08],cpu1",
        "SLURM_JOB_ID": "123456",
    }.items():
        no_launcher.setenv(name, value)
    assert find_place() == Place(3, 4, 1, 2)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert os.environ["MASTER_PORT"] == str(20000 + 123456 % 20000)


def test_a_batch_script_of_slurm_is_one_process(no_launcher):
    no_launcher.setenv("SLURM_NTASKS", "8")
    no_launcher.setenv("SLURM_PROCID", "0")
    assert find_place() == Place(0, 1, 0, 1)


def test_a_launcher_variable_that_is_no_number_is_named(no_launcher):
    no_launcher.setenv("RANK", "first")
    no_launcher.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK='first' is not a whole number"):
        find_place()


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("cuda", Place(0, 3, 0, 3), "two processes on one are refused"),
        ("cuda:1", Place(0, 2, 0, 2), "on one GPU"),
        ("cuda:7", Place(0, 1, 0, 1), "does not exist"),
    ],
)
def test_two_processes_on_one_gpu_are_refused(monkeypatch, name, place, message):
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=message):
        choose_device(name, place)
    assert choose_device("auto", Place(1, 2, 1, 2)) == torch.device("cuda", 1)


def test_cuda_asked_for_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees none"):
        choose_device("cuda", Place(0, 1, 0, 1))


def train_in_float64(path: str, synchronised: bool) -> None:
    """Three steps on fixed data; process r takes every world_size-th sample."""
    from utils.config.settings import Config

    with distributed.distributed(Config(device="cpu")) as process:
        from model import sdt
        from utils.run.batchnorm import convert_sync_batchnorm

        torch.manual_seed(0)
        sizes = dict(img_size_h=8, img_size_w=8, in_channels=1, num_classes=10, embed_dims=16, num_heads=2, depths=1)
        model: torch.nn.Module = sdt(**sizes, T=2, pooling_stat="0011").double()
        if synchronised:
            model = convert_sync_batchnorm(model, process.device)
        plain = model
        if process.world_size > 1:
            model = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        x = torch.randn(12, 1, 8, 8, dtype=torch.float64)
        y = torch.arange(12) % 10
        for _ in range(3):
            logits, _ = model(x[process.rank :: process.world_size])
            loss = torch.nn.functional.cross_entropy(logits, y[process.rank :: process.world_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if process.is_main:
            torch.save(plain.state_dict(), path)


def test_two_processes_with_half_batches_train_like_one_with_the_whole(tmp_path):
    for world_size in (1, 2):
        environments = processes.ranks(world_size) if world_size > 1 else [{}]
        children = [
            processes.start(train_in_float64, f"{world_size}.pth", world_size > 1, env=env, cwd=tmp_path)
            for env in environments
        ]
        assert processes.finish(*children) == [0] * world_size, (tmp_path / "output.txt").read_text()
    one, two = (read_checkpoint(tmp_path / f"{n}.pth") for n in (1, 2))
    assert one.keys() == two.keys()
    # Sums in another order differ by rounding, a few units of 1e-16; three steps amplify it. A wrong statistic
    # or gradient would show at 1e-3 and more.
    largest = max(float((one[k].double() - two[k].double()).abs().max()) for k in one)
    print(f"largest difference of weights and statistics: {largest:.1e}")
    assert largest < 1e-10
