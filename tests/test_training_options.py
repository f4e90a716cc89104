"""Options of train.py that change how a run trains: each trains, and does what it says."""

from __future__ import annotations

import csv
import functools
import json
import re
import sys
import types

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_recovery import TINY
from tiny import quick

from utils.errors import UserError
from utils.run.checkpoint import read_checkpoint
from utils.train import trainer

pytestmark = pytest.mark.slow

# What is tested here does not depend on how the parts of the model are computed, nor on the number of samples.
CONFIG = quick(TINY)
ONE_EPOCH = ["--epochs", "1", "--cooldown-epochs", "0", "-j", "0"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yml").write_text(CONFIG)
    return tmp_path


def run(folder, *options, experiment="run", status=0, target=processes.train):
    argv = ["-c", "tiny.yml", "--experiment", experiment, *ONE_EPOCH, *options]
    child = processes.start(target, argv, cwd=folder)
    text = folder / "output.txt"
    assert processes.finish(child) == [status], text.read_text()
    return text.read_text()


def summary(folder, experiment="run"):
    with (folder / f"output/train/{experiment}/summary.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def weights(folder, experiment="run", file="last.pth.tar", key="state_dict"):
    return read_checkpoint(folder / f"output/train/{experiment}" / file)[key]


NO_MIX = ["--mixup", "0"]
# Every option of a training is in one of these; what each does is tested where it acts (test_mixing, test_losses,
# test_loaders, test_optim, test_step, test_trainer).
COMBINATIONS = {
    "mixing, erasing, policies": [
        *("--cutmix", "0.5", "--mixup-mode", "elem", "--aa", "rand-m9-n1-mstd0.4-inc1", "--reprob", "0.5"),
        *("--remode", "pixel", "--recount", "2", "--use-multi-epochs-loader", "-j", "1", "--opt", "lamb"),
        *("--clip-grad", "0.1", "--bn-momentum", "0.2", "--bn-eps", "1e-3", "--channels-last", "--lr-noise", "0.1"),
    ],
    "TET in bfloat16": [
        *("--TET", "--TET-means", "0.5", "--TET-lamb", "0.05", "--amp", "--neuron-dtype", "input", "--spike-mode"),
        *("plif", "--clip-grad", "0.01", "--clip-mode", "value", "--aug-repeats", "3", "--sched", "step"),
        *("--decay-epochs", "1", "--cutmix-minmax", "0.2", "0.8", "--model-ema-force-cpu"),
    ],
    "copies with statistics of their own": [
        *(*NO_MIX, "--aug-splits", "3", "--jsd", "--split-bn", "-b", "24", "--aa", "rand-m3-n1", "--clip-grad", "0.01"),
        *("--clip-mode", "agc", "--no-prefetcher"),
    ],
    "binary cross entropy": [
        *("--bce-loss", "--bce-target-thresh", "0.2", "--no-aug", "--pin-mem", "--eval-metric", "loss", "--sched"),
        *("plateau", "--patience-epochs", "0", "--grad-accum-steps", "2", "--mixup-mode", "pair"),
    ],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_options_train_together_and_the_result_is_measured(folder, name):
    text = run(folder, *COMBINATIONS[name])
    (row,) = summary(folder)
    assert all(value == value and abs(value) != float("inf") for value in row.values())
    assert all(bool(torch.isfinite(w).all()) for w in weights(folder).values())
    argv = ["-c", "output/train/run/args.yaml", "--resume", "output/train/run/last.pth.tar", "-j", "0"]
    child = processes.start(processes.firing_num, argv, cwd=folder)
    assert processes.finish(child) == [0], (folder / "output.txt").read_text()
    told = [line for line in text.splitlines() if "warning" in line]
    assert [line for line in told if "cooldown_epochs" not in line] == []  # that one is for another schedule


def test_split_statistics_are_those_of_each_copy():
    """The first copy is N(0, 1), the second N(10, 1), at every time step."""
    from utils.run.batchnorm import convert_split_batchnorm

    T, S, B = 4, 2, 8
    bn = convert_split_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=1.0)), S, T)
    torch.manual_seed(0)
    x = torch.randn(T, S, B, 3, 5, 5)
    x[:, 1] += 10
    y = bn(x.flatten(0, 2))
    assert float(bn[0].running_mean.abs().max()) < 0.5
    assert float((bn[0].aux_bn[0].running_mean - 10).abs().max()) < 0.5
    # Each copy is normalised by its own statistics, and comes back in its place.
    expected = torch.stack([torch.nn.functional.batch_norm(x[:, s].flatten(0, 1), None, None, training=True)
                            .unflatten(0, (T, B)) for s in range(S)], dim=1)  # fmt: skip
    torch.testing.assert_close(y.unflatten(0, (T, S, B)), expected)


class Linear(torch.nn.Module):
    """A model without BatchNorm, whose gradients therefore add up exactly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(5, 3).double()

    def forward(self, x):
        return self.layer(x.flatten(1)), None


def test_accumulated_batches_train_like_one_large_batch():
    from utils.config.settings import Config
    from utils.run.distributed import Process
    from utils.run.precision import Precision
    from utils.train.step import TrainStep, train_one_epoch

    torch.manual_seed(0)
    x, y = torch.randn(32, 5, 1, 1, dtype=torch.float64), torch.arange(32) % 3
    weights = []
    for size, accumulate in ((12, 1), (4, 3), (4, 1)):
        # 32 samples: the last group has two batches of four, as at the end of an epoch.
        batches = list(zip(x.split(size), y.split(size), strict=True))
        model = Linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        precision = Precision(Config(), torch.device("cpu"))
        step = TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer, precision, accumulate=accumulate)
        train_one_epoch(step, batches, len(batches), Process(0, 1, torch.device("cpu")))
        weights.append(model.layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(weights[0], weights[2], rtol=1e-3)


def train_traced(argv):
    """What --compile does but for generating code, which takes a minute (test_fusion has a part of that)."""
    from utils.train import trainer

    trainer._compiled = lambda model: torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    processes.train(argv)


def test_a_compiled_run_has_the_losses_of_the_plain_one(folder):
    options = [*NO_MIX, "--kernels", "auto"]
    run(folder, *options, experiment="plain")
    run(folder, *options, "--compile", experiment="compiled", target=train_traced)
    plain, compiled = summary(folder, "plain")[0], summary(folder, "compiled")[0]
    # The traced graph may sum in another order: in float32 a spike within rounding of its threshold may flip, which
    # moves a mean loss over 240 samples in its fourth digit.
    for key in ("train_loss", "eval_loss", "ema_loss"):
        assert compiled[key] == pytest.approx(plain[key], rel=1e-3), key


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two epochs that saved its images."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yml").write_text(CONFIG)
    run(folder, "--epochs", "2", "--save-images", target=functools.partial(processes.train, curves=True))
    return folder


def test_tensorboard_files_hold_what_they_promise(finished):
    events = EventAccumulator(str(finished / "output/train/run"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/top1", "ema/top1", "lr", "speed/train_images_per_second"} <= scalars
    assert {"firing_rate/MS_SPS_lif", "firing_rate/MS_SSA_Conv0_kv", "firing_rate/head_lif"} <= scalars
    found = [point.value for point in events.Scalars("eval/top1")]
    assert found == pytest.approx([row["eval_top1"] for row in summary(finished)])
    assert "config/text_summary" in events.Tags()["tensors"]
    assert "evaluation images" in events.Tags()["images"]


def test_input_images_are_saved_on_request(finished):
    for name in ("training_images.png", "evaluation_images.png"):
        with Image.open(finished / "output/train/run" / name) as image:
            assert np.unique(np.asarray(image)).size > 5


def test_curves_are_drawn_at_the_end(finished):
    with Image.open(finished / "output/train/run/curves.png") as image:
        assert image.size == (1500, 480)
        assert np.unique(np.asarray(image)).size > 50


def test_summaries_agree(finished):
    lines = [json.loads(line) for line in (finished / "output/train/run/summary.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line, row in zip(lines, summary(finished), strict=True):
        assert line.keys() == row.keys()
        assert all(line[key] == pytest.approx(row[key], rel=1e-9) for key in row)


def test_a_dry_run_says_what_a_run_would_cost_and_writes_nothing(folder):
    text = run(folder, "--dry-run", "--epochs", "7")
    for promised in ("parameters", "images/s", "epoch: 0:00:", "for 7 epochs; peak memory"):
        assert promised in text
    assert not (folder / "output").exists()


def test_a_start_behind_the_end_is_refused_and_leaves_nothing(folder):
    text = run(folder, "--epochs", "3", "--cooldown-epochs", "1", "--start-epoch", "4", status=2)
    assert "error: start_epoch: 4 leaves nothing of the 4 epochs, which count from 0; use 3 or less" in text
    assert not list(folder.glob("output/train/*"))


@pytest.mark.parametrize("interval", ["0", "1"])
def test_what_is_not_finite_stops_the_run_and_is_not_saved(folder, interval):
    """Loss or gradients show it before the update, or a running statistic when a checkpoint is due."""
    # The decay makes the weights 1e5 times as large in each step.
    options = ["--lr", "1000", "--weight-decay", "100", "--warmup-epochs", "0", "--epochs", "3", "--opt", "sgd"]
    text = run(folder, *options, "--recovery-interval", interval, status=2)
    before_update = r"epoch \d: the (loss is nan|gradient of \S+ is not finite) in step .*the weights were not updated"
    saving = r"\S+ is no longer finite, so this state is not saved"
    assert re.search(f"train.py: error: ({before_update}|{saving})", text)
    assert re.search(r"The last good state is output/train/run/(recovery|last).pth.tar", text)
    assert "Traceback" not in text
    for file in (folder / "output/train/run").glob("*.pth.tar"):
        assert all(bool(torch.isfinite(value).all()) for value in weights(folder, file=file.name).values())


def train_with_wandb(argv):
    """Train with a stand-in for the package, which prints what it is given."""
    fake = types.ModuleType("wandb")

    class Run:
        def log(self, values, step):
            print("wandb log", step, sorted(values)[:3])

        def finish(self):
            print("wandb finish")

    fake.init = lambda **arguments: print("wandb init", arguments["name"]) or Run()  # type: ignore[attr-defined]
    sys.modules["wandb"] = fake
    processes.train(argv)


def test_weights_and_biases_gets_each_epoch(folder):
    text = run(folder, "--log-wandb", "--epochs", "2", target=train_with_wandb)
    assert text.count("wandb init run") == 1
    assert text.count("wandb log") == 2
    assert text.count("wandb finish") == 1


def train_without_wandb(argv):
    sys.modules["wandb"] = None  # type: ignore[assignment] -- makes the import fail
    processes.train(argv)


def test_weights_and_biases_missing_is_one_line(folder):
    text = run(folder, "--log-wandb", status=2, target=train_without_wandb)
    assert "error: log_wandb: the package wandb cannot be imported" in text
    assert not list(folder.glob("output/train/*"))  # a run that never began leaves no folder
    assert "Traceback" not in text


def test_compile_without_a_compiler_is_one_line_before_the_first_step(monkeypatch):
    seen = []

    def refuses(function):
        seen.append(function(torch.ones(1)).item())
        raise RuntimeError("InvalidCxxCompiler: no working compiler\n\nSet TORCHDYNAMO_VERBOSE=1 ...")

    monkeypatch.setattr(torch, "compile", refuses)
    for _ in range(2):
        trainer._try_compiler.cache_clear()
        with pytest.raises(UserError, match=r"compile: .*InvalidCxxCompiler: no working compiler\); .*CXX") as caught:
            trainer._compiled(torch.nn.Linear(1, 1))
        assert "\n" not in str(caught.value)
    assert seen[0] != seen[1]  # else a stored result could hide what is missing
