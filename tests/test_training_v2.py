"""Training of V2 as published: learning rates per step, 16 steps of LAMB, and the values of its configurations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden import load_json, under
from golden_v2 import golden_model
from torch import nn

from utils.config.parse import config_from, load_yaml
from utils.config.settings import Config
from utils.run.distributed import Process
from utils.run.precision import Precision
from utils.train.losses import make_train_loss
from utils.train.optim import learning_rate, make_optimizer, make_schedule, peak_learning_rate, set_rate_of_step
from utils.train.run_state import RunState
from utils.train.step import TrainStep, make_step

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES, DEFAULTS, SIZES = (load_json(f"v2/{name}_v2") for name in ("lr_schedules", "cli_defaults", "state_dicts"))
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "conf/imagenet").glob("v2_*.yml"))
# Form of the file -> the published schedule, and GPUs x images per GPU.
FORMS = {
    "200E_t1": ("t1_published", 1024),
    "50E_t4": ("t1_to_t4_published", 192),
    "20E_t4": ("t1_to_t4_20_epochs", 256),
}


def test_every_published_form_is_there():
    assert {Path(path).stem for path in FILES} == {f"v2_{s}_{form}" for s in ("15m", "31m", "55m") for form in FORMS}


@pytest.mark.parametrize("path", FILES)
def test_the_learning_rates_of_each_file_are_the_published_ones(path):
    cfg = load_yaml(ROOT / path)
    golden, batch = FORMS[Path(path).stem.split("_", 2)[2]]
    golden = SCHEDULES[golden]
    assert batch == golden["global_batch"] == 8 * cfg.batch_size
    assert peak_learning_rate(cfg, world_size=8) == pytest.approx(golden["peak_lr"], rel=1e-15)
    optimizer = make_optimizer(cfg, nn.Linear(2, 2), world_size=8)
    steps = 20
    schedule, epochs = make_schedule(cfg, optimizer, steps)
    assert epochs == golden["epochs"]
    for key, step in (("lr_at_epoch_plus_0", 0), ("lr_at_epoch_plus_half", steps // 2)):
        found = []
        for epoch in range(epochs):
            set_rate_of_step(schedule, epoch, steps, step)
            found.append(learning_rate(optimizer))
        assert found == pytest.approx(golden[key], abs=1e-15, rel=0)


# Our name of a published option, and what its value is here. Options without effect there are left out.
_SAME = {
    "weight_decay": "weight_decay",
    "min_lr": "min_lr",
    "aa": "aa",
    "smoothing": "smoothing",
    "reprob": "reprob",
    "remode": "remode",
    "recount": "recount",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "input_size": "img_size",
    "seed": "seed",
    "clip_grad": "clip_grad",
    "accum_iter": "grad_accum_steps",
    "distillation_alpha": "kd_alpha",
    "distillation_tau": "kd_tau",
    "num_workers": "workers",
    "pin_mem": "pin_mem",
}


@pytest.mark.parametrize("path", FILES)
def test_each_file_has_the_effective_values_of_the_published_command_line(path):
    cfg = load_yaml(ROOT / path)
    for option, name in _SAME.items():
        assert getattr(cfg, name) == DEFAULTS[f"--{option}"]["default"], name
    form = Path(path).stem.split("_", 2)[2]
    scratch = form == "200E_t1"
    assert (cfg.time_steps, cfg.epochs) == ((1, 200) if scratch else (4, int(form.split("E")[0])))
    assert (cfg.kd, cfg.teacher) == (("none", "") if scratch else ("hard", "caformer_b36.sail_in22k_ft_in1k"))
    assert (cfg.opt, cfg.opt_eps, cfg.opt_betas, cfg.amp) == ("lambc", None, None, True)
    if scratch:
        assert cfg.lr_base == DEFAULTS["--blr"]["default"]
        assert cfg.warmup_epochs == DEFAULTS["--warmup_epochs"]["default"]
    assert (cfg.scale, cfg.hflip, cfg.train_interpolation) == (Config().scale, 0.5, "bicubic")


@pytest.mark.parametrize("path", FILES)
def test_each_header_states_parameters_cost_and_what_is_published(path):
    text = re.match(r"(#.*\n)*", (ROOT / path).read_text()).group()
    cfg = load_yaml(ROOT / path)
    params = SIZES[cfg.model]["params" if cfg.kd == "none" else "params_with_kd"]
    for words in (f"{params:,} parameters", "not measured here", "Published:", f"firing_num.py -c {path}"):
        assert words in text


def test_sixteen_steps_of_lamb_follow_the_published_trajectory():
    tensors, model = golden_model("trajectory_lamb", state="init")
    cfg = config_from(
        {"opt": "lambc", "weight_decay": 0.05, "lr": 2.4e-3, "sched": "cosine", "epochs": 4, "warmup_epochs": 1}
        | {"warmup_lr": 0.0, "min_lr": 1e-6, "cooldown_epochs": 0, "sched_on_updates": True, "warmup_prefix": True}
        | {"smoothing": 0.1}
    )
    process = Process(0, 1, torch.device("cpu"))
    optimizer = make_optimizer(cfg, model.train())
    schedule, _ = make_schedule(cfg, optimizer, 4)
    state = RunState(model, optimizer, schedule, Precision(cfg, process.device), None)
    losses, rates = [], []
    for number in range(16):
        epoch, step = divmod(number, 4)
        train = make_step(cfg, epoch, model, state, (), process, steps=4)
        batch = number % 3
        losses.append(train.run(tensors["inputs"][batch], tensors["targets"][batch], step, 3).item())
        rates.append(learning_rate(optimizer))
    assert rates == pytest.approx(tensors["lrs"].tolist(), abs=1e-15, rel=0)
    assert rates[0] == 0
    assert losses == pytest.approx(tensors["losses"].tolist(), abs=1e-7, rel=0)
    assert losses[-1] < losses[0]
    final, found = under(tensors, "final"), model.state_dict()
    assert set(final) == set(found)
    for key, expected in final.items():
        assert float((found[key] - expected).abs().max()) < 1e-6, key


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"kd": "hard"}, "train/loss"),
        ({"kd": "hard", "kd_alpha": 0.3}, "train/loss_hard_alpha0.3"),
        ({"kd": "soft"}, "train/loss_soft_tau1"),
        ({"kd": "soft", "kd_tau": 3.0}, "train/loss_soft_tau3"),
    ],
)
def test_distillation_losses_are_the_published_ones(settings, loss):
    tensors, model = golden_model("t2_kd_odd_size")
    criterion = make_train_loss(config_from(settings | {"teacher": "resnet18"}), mixup_active=False)
    logits, _ = model.train()(tensors["input"])
    found = criterion(logits, tensors["target"], tensors["teacher"])
    assert float(found.detach()) == pytest.approx(float(tensors[loss]), rel=1e-9)


def test_with_accumulation_a_group_of_batches_has_one_rate():
    model, asked = nn.Linear(2, 2), []
    step = TrainStep(
        Called(model),
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        Precision(Config(), torch.device("cpu")),
        accumulate=2,
        set_rate=asked.append,
    )
    for number in range(5):
        step.run(torch.randn(3, 2), torch.tensor([0, 1, 0]), number, 4)
    assert asked == [0, 2, 4]


class Called(nn.Module):
    """A layer with the calling convention of a model here."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x), None
