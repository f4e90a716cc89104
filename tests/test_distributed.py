"""Launchers, and results that do not depend on the number of processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from test_recovery import TINY
from tiny import lively, quick, tiny

from utils.config.parse import parse_config
from utils.errors import UserError
from utils.run import distributed
from utils.run.checkpoint import read_checkpoint
from utils.run.distributed import Place, choose_device, find_place

pytestmark = pytest.mark.slow

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yml").write_text(quick(TINY))
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


JOINED = """
import sys
from utils.config.parse import parse_config
from utils.run.distributed import distributed
with distributed(parse_config(sys.argv[1:], prog="train.py", description="")) as process:
    ranks = process.gather(process.rank)
    if process.is_main:
        print(f"{process.world_size} process(es) on {process.device.type}, ranks {ranks}")
"""


@pytest.mark.parametrize("launcher", ["run", "launch"])
def test_a_launcher_starts_two_processes_on_a_cpu(tmp_path, launcher):
    """torchrun and torch.distributed.launch; what train.py then does is tested below with the same variables."""
    (tmp_path / "joined.py").write_text(JOINED)
    port = processes.ranks(1)[0]["MASTER_PORT"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", f"torch.distributed.{launcher}", "--nproc_per_node=2", f"--master_port={port}"),
            *(str(tmp_path / "joined.py"), "--device", "cpu"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(processes.ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 process(es) on cpu, ranks [0.0, 1.0]\n"


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


# 61 is a multiple of neither 2 nor 3: the processes have different numbers of samples.
ODD_SET = """
import numpy as np
from utils.data.register import register_dataset

class Noise:
    def __len__(self):
        return 61

    def __getitem__(self, index):
        return np.random.RandomState(index).randint(0, 256, (8, 8), np.uint8), index % 10

register_dataset("noise", lambda cfg, training: Noise(), classes=10, input_size=(1, 8, 8), mean=(0.5,), std=(0.25,))
"""


def test_evaluation_and_firing_rates_are_the_same_with_1_2_and_3_processes(folder):
    (folder / "odd_set.py").write_text(ODD_SET)
    sizes = dict(img_size_h=8, img_size_w=8, in_channels=1, num_classes=10, num_heads=2, mlp_ratios=4)
    torch.manual_seed(0)
    torch.save({"state_dict": lively(tiny(**sizes)).state_dict()}, folder / "a.pth.tar")
    results, accuracies = [], set()
    for world_size in (1, 2, 3):
        argv = ["-c", "tiny.yml", "--plugin", "odd_set.py", "--dataset", "noise", "--resume", "a.pth.tar", "-j", "0"]
        argv += ["--batch-size", "7", "--output", f"firing{world_size}"]
        assert in_all_ranks(folder, processes.firing_num, argv, world_size) == [0] * world_size
        tables = []
        for name in ("firing.csv", "layers.csv"):
            with next((folder / f"firing{world_size}").rglob(name)).open() as file:
                tables += list(csv.reader(file))
        results.append(tables)
        report = json.loads(next((folder / f"firing{world_size}").rglob("report.json")).read_text())
        assert report["samples"] == 61
        assert 0 < report["mean_firing_rate"] < 1
        accuracies.add((report["top1_percent"], report["top5_percent"]))
    assert len(results[0]) > 10
    assert results[0] == results[1] == results[2]
    ((top1, top5),) = accuracies
    assert (top1 * 61 / 100) == pytest.approx(round(top1 * 61 / 100))
    assert 0 < top1 < top5 < 100


def epochs_of_each_rank(argv: list[str]) -> None:
    """Train and evaluate an epoch with each way of sharing running statistics; write what this process then has."""
    import model  # noqa: F401 -- registers the models
    from utils.train.trainer import Trainer

    cfgs = {name: parse_config([*argv, *more], prog="train.py", description="") for name, more in SHARING.items()}
    found = {}
    with distributed.distributed(cfgs["broadcast"]) as process:
        for name, cfg in cfgs.items():
            folder = Path(f"{name}{process.rank}")
            folder.mkdir()
            trainer = Trainer(cfg, process, folder)
            buffers = dict(trainer.state.model.named_buffers())
            assert trainer.state.ema is not None
            with trainer.files():
                loss = trainer.train(0).loss
                before = {key: value.clone() for key, value in buffers.items()}
                trainer.evaluate(0)
            found[name] = {"loss": loss, "own_loss": trainer._finished.mean_loss(), "before": before, "after": buffers,
                           "average": trainer.state.ema.module.state_dict()}  # fmt: skip
        torch.save(found, f"rank{process.rank}.pth")


SHARING = {"broadcast": [], "reduce": ["--dist-bn", "reduce"], "synchronised": ["--sync-bn"]}


def test_running_statistics_of_all_processes(folder):
    argv = ["-c", "tiny.yml", "-j", "0", "-b", "24"]
    assert in_all_ranks(folder, epochs_of_each_rank, argv, 2) == [0, 0], (folder / "output.txt").read_text()
    first, second = (read_checkpoint(folder / f"rank{rank}.pth") for rank in (0, 1))
    for name in SHARING:
        one, other = first[name], second[name]
        statistics = [key for key in one["before"] if "running" in key]
        assert len(statistics) > 10
        for key in statistics:
            mine, theirs = one["before"][key], other["before"][key]
            assert torch.equal(mine, theirs) == (name == "synchronised"), key
            expected = (mine + theirs) / 2 if name == "reduce" else mine
            torch.testing.assert_close(one["after"][key], expected, rtol=1e-6, atol=0)
            assert torch.equal(one["after"][key], other["after"][key])
        assert all(torch.equal(value, other["average"][key]) for key, value in one["average"].items())
        # The loss that is logged is that of all samples; both processes have equally many.
        assert one["own_loss"] != other["own_loss"]
        assert one["loss"] == other["loss"] == pytest.approx((one["own_loss"] + other["own_loss"]) / 2, rel=1e-12)
        assert not list((folder / f"{name}1").iterdir())  # files are rank 0's


def test_sums_over_processes_are_exact_beyond_2_to_the_24(monkeypatch):
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda values: values.mul_(2))  # two processes with the same
    process = distributed.Process(0, 2, torch.device("cpu"))
    assert process.sum(2**24 + 1, 0.1) == [2**25 + 2, 0.2]
    assert process.sum_tensor(torch.tensor([2**53 + 1])).tolist() == [2**54 + 2]


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
