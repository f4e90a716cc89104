"""Options of train.py that change how a run trains: each trains, and does what it says."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import types

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_recovery import TINY

from utils.run.checkpoint import read_checkpoint

ONE_EPOCH = ["--epochs", "1", "--cooldown-epochs", "0", "-j", "0"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yml").write_text(TINY)
    return tmp_path


def run(folder, *options, experiment="run", status=0, target=processes.train, timeout=120.0):
    argv = ["-c", "tiny.yml", "--experiment", experiment, *ONE_EPOCH, *options]
    child = processes.start(target, argv, cwd=folder)
    text = folder / "output.txt"
    assert processes.finish(child, timeout=timeout) == [status], text.read_text()
    return text.read_text()


def summary(folder, experiment="run"):
    with (folder / f"output/train/{experiment}/summary.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def weights(folder, experiment="run", file="last.pth.tar", key="state_dict"):
    return read_checkpoint(folder / f"output/train/{experiment}" / file)[key]


NO_MIX = ["--mixup", "0"]
OPTIONS = {
    "cutmix": ["--cutmix", "1.0"],
    "mixup per pair": ["--mixup-mode", "pair"],
    "mixup per sample": ["--mixup-mode", "elem", "--cutmix", "0.5"],
    "cutmix by its range": ["--cutmix-minmax", "0.2", "0.8"],
    "label smoothing": NO_MIX,
    "cross entropy": [*NO_MIX, "--smoothing", "0"],
    "binary cross entropy": ["--bce-loss", "--bce-target-thresh", "0.2"],
    "TET": ["--TET", "--TET-lamb", "0.05"],
    "TET without mixup": ["--TET", "--TET-means", "0.5", "--TET-lamb", "0.05", *NO_MIX],
    "augmentation splits with JSD": [*NO_MIX, "--aug-splits", "3", "--jsd", "-b", "60", "--aa", "rand-m3-n1"],
    "split BatchNorm": [*NO_MIX, "--aug-splits", "2", "--split-bn", "-b", "120"],
    "repeated augmentation": ["--aug-repeats", "3"],
    "random erasing": ["--reprob", "0.5", "--remode", "pixel", "--recount", "2"],
    "RandAugment": ["--aa", "rand-m9-n1-mstd0.4-inc1"],
    "AutoAugment": ["--aa", "original"],
    "no augmentation": ["--no-aug"],
    "no prefetcher": ["--no-prefetcher"],
    "channels last": ["--channels-last"],
    "bfloat16": ["--amp"],
    "bfloat16 with the state in bfloat16": ["--amp", "--neuron-dtype", "input"],
    "parametric neurons": ["--spike-mode", "plif"],
    "clipping by norm": ["--clip-grad", "0.1"],
    "clipping by value": ["--clip-grad", "0.01", "--clip-mode", "value"],
    "adaptive clipping": ["--clip-grad", "0.01", "--clip-mode", "agc"],
    "lamb": ["--opt", "lamb"],
    "loss as metric": ["--eval-metric", "loss"],
    "average on the host": ["--model-ema-force-cpu"],
    "BatchNorm momentum": ["--bn-momentum", "0.2", "--bn-eps", "1e-3"],
    "pinned memory": ["--pin-mem"],
    "several epochs' loader": ["--use-multi-epochs-loader", "-j", "1"],
    "accumulation": ["--grad-accum-steps", "2", "-b", "120"],
    "a named size": ["--model", "sdt_2_256", "--layer", "1", "--dim", "16", "--num-heads", "2"],
}


# These change where or how fast something is computed, or what is kept or called how, not what is learned.
# The kernels put channels innermost in any case, so `channels_last` changes no number; for it see test_contract.py.
SAME_WEIGHTS = {
    "a named size",
    "channels last",
    "pinned memory",
    "several epochs' loader",
    "loss as metric",
    "average on the host",
}


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "tiny.yml").write_text(TINY)
    run(folder)
    return weights(folder)


@pytest.mark.parametrize("name", OPTIONS)
def test_option_trains_and_has_its_effect(folder, name, plain_weights):
    text = run(folder, *OPTIONS[name])
    assert "warning" not in text
    (row,) = summary(folder)
    assert all(value == value and abs(value) != float("inf") for value in row.values())
    learned = weights(folder)
    assert all(bool(torch.isfinite(w).all()) for w in learned.values())
    same = all(torch.equal(learned[key], w) for key, w in plain_weights.items())
    assert same == (name in SAME_WEIGHTS)


SCHEDULES = {
    "noise": ["--lr-noise", "0.1", "0.9"],
    "step": ["--sched", "step", "--decay-epochs", "1"],
    "plateau": ["--sched", "plateau", "--patience-epochs", "0", "--eval-metric", "loss"],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_sets_other_learning_rates_than_the_cosine(folder, name):
    text = run(folder, *SCHEDULES[name], "--epochs", "3")
    assert "warning" not in text
    rates = [row["lr"] for row in summary(folder)]
    cosine = [0.005, 0.0037525, 0.0012575]  # from 5e-3 to 1e-5 over three epochs
    assert len(rates) == 3
    assert rates != pytest.approx(cosine)


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


def test_a_split_checkpoint_is_evaluated(folder):
    run(folder, *OPTIONS["split BatchNorm"])
    argv = ["-c", "output/train/run/args.yaml", "--resume", "output/train/run/last.pth.tar", "-j", "0"]
    child = processes.start(processes.firing_num, argv, cwd=folder)
    assert processes.finish(child) == [0], (folder / "output.txt").read_text()


def test_mixup_ends_at_its_epoch(folder):
    """A run whose mixup ends at epoch 1 is the mixed one before it and the unmixed one's kind after it."""
    long = ["--epochs", "2"]
    run(folder, *long, experiment="mixed")
    run(folder, *long, "--mixup-off-epoch", "1", experiment="ends")
    mixed, ends = summary(folder, "mixed"), summary(folder, "ends")
    assert mixed[0] == ends[0]
    assert mixed[1]["train_loss"] != ends[1]["train_loss"]


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
    x, y = torch.randn(28, 5, 1, 1, dtype=torch.float64), torch.arange(28) % 3
    weights = []
    for size, accumulate in ((12, 1), (4, 3), (4, 1)):
        # 28 samples: the last group is smaller, as at the end of an epoch.
        batches = list(zip(x.split(size), y.split(size), strict=True))
        model = Linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        precision = Precision(Config(), torch.device("cpu"))
        step = TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer, precision, accumulate=accumulate)
        train_one_epoch(step, batches, len(batches), Process(0, 1, torch.device("cpu")))
        weights.append(model.layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(weights[0], weights[2], rtol=1e-3)


def test_linear_probing_trains_the_head_only(folder):
    run(folder, experiment="first")
    before = weights(folder, "first")
    run(folder, "--initial-checkpoint", "output/train/first/last.pth.tar", "--linear-prob", experiment="probe")
    after = weights(folder, "probe")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"head.weight", "head.bias"}


def test_learning_rate_by_batch_size(folder):
    text = run(folder, "--lr-base", "0.01", "--lr-base-size", "480", "--warmup-epochs", "0")
    assert "peak learning rate 0.005, lr_base 0.01 scaled with it" in text
    assert summary(folder)[0]["lr"] == pytest.approx(0.005)
    assert "lr 0.005 is ignored: lr_base 0.01 sets the learning rate" in text


def test_the_average_starts_from_the_weights_and_follows_them(folder):
    run(folder, "--model-ema-decay", "0", experiment="follows")
    assert all(torch.equal(w, weights(folder, "follows", key="state_dict_ema")[k])
               for k, w in weights(folder, "follows").items())  # fmt: skip
    run(folder, "--model-ema-decay", "0.99", experiment="lags")
    assert not torch.equal(
        weights(folder, "lags")["head.weight"], weights(folder, "lags", key="state_dict_ema")["head.weight"]
    )


def test_a_named_size_is_saved_with_its_sizes(folder):
    run(folder, *OPTIONS["a named size"])
    config = weights(folder, key="config")
    assert (config["layer"], config["dim"], config["pooling_stat"]) == (1, 16, "0011")
    argv = ["-c", "output/train/run/args.yaml", "--resume", "output/train/run/last.pth.tar", "-j", "0"]
    assert processes.finish(processes.start(processes.firing_num, argv, cwd=folder)) == [0]


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_the_plain_one(folder):
    run(folder, *NO_MIX, experiment="plain")
    # About a minute of one core: ten times that is only reached by a hang.
    run(folder, *NO_MIX, "--compile", experiment="compiled", timeout=600.0)
    plain, compiled = summary(folder, "plain")[0], summary(folder, "compiled")[0]
    # The compiler sums in another order: in float32 a spike within rounding of its threshold may flip, which moves
    # a mean loss over 1200 samples in its fifth digit.
    for key in ("train_loss", "eval_loss", "ema_loss"):
        assert compiled[key] == pytest.approx(plain[key], rel=1e-3), key


def test_tensorboard_files_hold_what_they_promise(folder):
    run(folder)
    events = EventAccumulator(str(folder / "output/train/run"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/top1", "ema/top1", "lr", "speed/train_images_per_second"} <= scalars
    assert {"firing_rate/MS_SPS_lif", "firing_rate/MS_SSA_Conv0_kv", "firing_rate/head_lif"} <= scalars
    assert events.Scalars("eval/top1")[0].value == pytest.approx(summary(folder)[0]["eval_top1"])
    assert "config/text_summary" in events.Tags()["tensors"]
    assert "evaluation images" in events.Tags()["images"]


def test_input_images_are_saved_on_request(folder):
    run(folder, "--save-images")
    for name in ("training_images.png", "evaluation_images.png"):
        with Image.open(folder / "output/train/run" / name) as image:
            assert np.unique(np.asarray(image)).size > 5


def test_summaries_agree(folder):
    run(folder, "--epochs", "2")
    lines = [json.loads(line) for line in (folder / "output/train/run/summary.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line, row in zip(lines, summary(folder), strict=True):
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
    """Loss or gradients show it before the update; a recovery checkpoint may find it in a running statistic."""
    options = ["--lr", "1e30", "--warmup-epochs", "0", "--epochs", "3", "--opt", "sgd"]
    text = run(folder, *options, "--recovery-interval", interval, status=2)
    before_update = r"epoch 1: the (loss is nan|gradient of \S+ is not finite) in step .*the weights were not updated"
    assert re.search(f"train.py: error: {before_update}", text) or (
        interval == "1" and "is no longer finite, so this state is not saved" in text
    )
    assert "The last good state is output/train/run/recovery.pth.tar" in text
    assert "Traceback" not in text
    good = weights(folder, file="recovery.pth.tar")
    assert all(bool(torch.isfinite(value).all()) for value in good.values())


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
