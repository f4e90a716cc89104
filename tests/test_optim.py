"""Optimizer and schedule: the published learning rates and loss trajectories, and clear refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import load_json, load_tensors, model_arguments, under
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model import sdt
from utils.config.parse import config_from, load_yaml
from utils.config.settings import SETTINGS
from utils.errors import UserError
from utils.train.optim import learning_rate, make_optimizer, make_schedule, peak_learning_rate

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = load_json("lr_schedules")
# timm 1.0.15 hands the epoch to torch 2.6's plateau schedule, which says that this is deprecated.
_PLATEAU = "ignore:.*(verbose parameter|epoch parameter).*:UserWarning"


@pytest.fixture
def dummy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def rates(cfg, model, metric=50.0):
    """The learning rate in force in each epoch, stepped as training does."""
    optimizer = make_optimizer(cfg, model)
    schedule, epochs = make_schedule(cfg, optimizer)
    found = []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for epoch in range(epochs):
        found.append(learning_rate(optimizer))
        optimizer.step()
        schedule.step(epoch + 1, metric)
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_published_configuration_has_its_published_learning_rates(name, dummy):
    golden = SCHEDULES[name]
    found = rates(load_yaml(ROOT / f"conf/{name}.yml"), dummy)
    assert len(found) == golden["num_epochs"] == len(golden["lr"])
    assert found == pytest.approx(golden["lr"], abs=1e-12, rel=0)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_thirty_steps_follow_the_published_loss_trajectory(name):
    meta, tensors = load_tensors(f"trajectory_{name}")
    model = sdt(**model_arguments(meta["cfg"])).double()
    model.load_state_dict(under(tensors, "init"), strict=True)
    optimizer = make_optimizer(config_from({key: meta[key] for key in ("opt", "weight_decay", "lr")}), model.train())
    losses = []
    for step in range(meta["steps"]):
        batch = step % meta["batch_cycle"]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tensors["inputs"][batch])[0], tensors["targets"][batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(tensors["losses"].tolist(), abs=1e-7, rel=0)
    # Biases of convolutions in front of a BatchNorm have an exact gradient of zero: what they get is rounding noise,
    # which these optimizers amplify by 1/epsilon, and the biases themselves start at 0. Hence the absolute part.
    final, state = under(tensors, "final"), model.state_dict()
    assert set(final) == set(state)
    for key, expected in final.items():
        torch.testing.assert_close(state[key], expected, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


def test_biases_and_one_dimensional_tensors_are_not_decayed_and_unused_parameters_left_out():
    model = sdt(img_size=16, embed_dims=16, depths=1, pooling_stat="0011", spike_mode="plif")
    optimizer = make_optimizer(config_from({"opt": "adamw", "weight_decay": 0.06}), model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay, name
        elif name.endswith(".bias") or parameter.ndim <= 1:
            assert decay[id(parameter)] == 0, name
        else:
            assert decay[id(parameter)] == 0.06, name
    assert set(decay.values()) == {0, 0.06}


def test_decay_reaches_the_weights_alone(dummy):
    before = {name: p.detach().clone() for name, p in dummy.named_parameters()}
    optimizer = make_optimizer(config_from({"opt": "adamw", "weight_decay": 0.5, "lr": 0.1}), dummy)
    for parameter in dummy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in dummy.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("opt", ["sgd", "AdamW", "lamb", "lookahead_adamw"])
def test_named_optimizers_take_steps(opt, dummy):
    optimizer = make_optimizer(config_from({"opt": opt}), dummy)
    before = dummy[0].weight.detach().clone()
    dummy(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(dummy[0].weight, before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_updates_are_fused_where_torch_can(device):
    with FakeTensorMode(), torch.device(device):
        layer = nn.Linear(3, 4)
        made = {opt: make_optimizer(config_from({"opt": opt}), layer) for opt in ("AdamW", "adam", "sgd", "lamb")}
    fused = {opt: bool(optimizer.defaults.get("fused")) for opt, optimizer in made.items()}
    assert fused == {"AdamW": True, "adam": True, "sgd": device == "cuda", "lamb": False}


def test_settings_reach_the_optimizer(dummy):
    cfg = config_from({"opt": "adamw", "lr": 0.5, "opt_eps": 1e-6, "opt_betas": [0.8, 0.95]})
    for group in make_optimizer(cfg, dummy).param_groups:
        assert (group["lr"], group["eps"], group["betas"]) == (0.5, 1e-6, (0.8, 0.95))
    for group in make_optimizer(config_from({"opt": "sgd", "momentum": 0.7}), dummy).param_groups:
        assert group["momentum"] == 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt": "adamww"}, "opt: 'adamww' is not an optimizer of timm; did you mean adamw\\? Valid: .*lamb, "),
        ({"opt": "lookahead_lam"}, "'lookahead_lam' is not an optimizer of timm; did you mean lamb\\?"),
        ({"opt": "qqq"}, "'qqq' is not an optimizer of timm. Valid: "),
        ({"opt": "adahessian"}, "'adahessian' needs second derivatives"),
        ({"opt": "adamw", "opt_betas": [0.9]}, "opt_betas: .* has 1 values, 'adamw' takes 2 \\(default: 0.9, 0.999\\)"),
        ({"opt": "adan", "opt_betas": [0.9, 0.99]}, "has 2 values, 'adan' takes 3"),
        ({"opt": "sgd", "opt_betas": [0.9, 0.99]}, "opt_betas: 'sgd' has no betas; leave them out"),
        ({"opt": "sgd", "opt_eps": 1e-6}, "opt_eps: 'sgd' has no epsilon; leave it out"),
    ],
)
def test_what_an_optimizer_cannot_take_is_refused(settings, message, dummy):
    with pytest.raises(UserError, match=message) as caught:
        make_optimizer(config_from(settings), dummy)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the missing package is another one")
def test_an_optimizer_of_a_missing_package_names_what_is_missing(dummy):
    with pytest.raises(UserError, match="opt: 'fusedlamb' cannot be used here: CUDA required"):
        make_optimizer(config_from({"opt": "fusedlamb"}), dummy)


def after_the_warm_up(sched, epoch, *, epochs=12, peak=0.1, least=0.001):
    """The learning rate of one epoch with decay_epochs 4, decay_rate 0.5, patience 1 and a constant metric."""
    done = epoch / epochs
    if done >= 1:
        return least
    if sched == "step":
        return peak * 0.5 ** (epoch // 4)
    if sched == "plateau":  # the first metric is that of epoch 3; each second one without progress halves the rate
        return peak * 0.5 ** max(0, epoch // 2 - 2)
    share = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "tanh": (1 - math.tanh(-7 * (1 - done) + 3 * done)) / 2,  # Hsueh et al. 2019, with timm's bounds
        "poly": (1 - done) ** 0.5,
    }[sched]
    return least + (peak - least) * share


@pytest.mark.filterwarnings(_PLATEAU)
@pytest.mark.parametrize("sched", SETTINGS["sched"].rules.choices)
def test_every_schedule_has_its_learning_rates(sched, dummy):
    cfg = config_from(
        {"sched": sched, "lr": 0.1, "epochs": 12, "warmup_epochs": 3, "warmup_lr": 0.01, "cooldown_epochs": 2}
        | {"min_lr": 0.001, "decay_epochs": 4, "decay_rate": 0.5, "patience_epochs": 1}
    )
    found = rates(cfg, dummy)  # a metric that never improves
    assert len(found) == (12 if sched in ("step", "plateau") else 14)
    end = after_the_warm_up("tanh", 3) if sched == "tanh" else 0.1  # timm's warm-up meets the tanh, else the peak
    warm_up = [0.01 + (end - 0.01) * epoch / 3 for epoch in range(3)]
    assert found == pytest.approx(warm_up + [after_the_warm_up(sched, epoch) for epoch in range(3, len(found))])


@pytest.mark.filterwarnings(_PLATEAU)
@pytest.mark.parametrize(("metric", "falls"), [("top1", True), ("loss", False)])
def test_plateau_knows_in_which_direction_the_metric_improves(metric, falls, dummy):
    cfg = config_from(
        {"sched": "plateau", "eval_metric": metric, "epochs": 9, "warmup_epochs": 0, "patience_epochs": 2}
    )
    optimizer = make_optimizer(cfg, dummy)
    schedule, epochs = make_schedule(cfg, optimizer)
    for epoch in range(epochs):
        optimizer.step()
        schedule.step(epoch + 1, 10.0 - epoch)  # better for a loss, worse for an accuracy
    assert (learning_rate(optimizer) < cfg.lr) is falls


@pytest.mark.parametrize(("noise", "noisy"), [([0.5], range(5, 12)), ([0.25, 0.5], range(3, 5))])
def test_learning_rate_noise_lies_in_its_range_and_repeats_by_seed(noise, noisy, dummy):
    plain = {"sched": "cosine", "lr": 0.1, "epochs": 10, "warmup_epochs": 2, "cooldown_epochs": 0}
    clean = rates(config_from(plain), dummy)
    once = rates(config_from(plain | {"lr_noise": noise}), dummy)
    assert once == rates(config_from(plain | {"lr_noise": noise}), dummy)
    assert once != rates(config_from(plain | {"lr_noise": noise, "seed": 7}), dummy)
    differing = {epoch for epoch, pair in enumerate(zip(once, clean, strict=True)) if pair[0] != pair[1]}
    assert differing
    assert differing <= set(noisy)
    assert all(abs(a - b) <= 0.67 * b + 1e-15 for a, b in zip(once, clean, strict=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sched": "cosine", "lr_cycle_mul": 0.5, "epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 6},
         r"sched: cosine gives no usable learning rate in epoch \d of 8 \(math domain error\); .*lr_cycle_mul 0.5"),
        ({"sched": "step", "decay_epochs": 0.001, "decay_rate": 10}, r"sched: step gives no .*decay_epochs 0.001"),
        ({"sched": "plateau", "decay_rate": 10}, r"sched: plateau gives no .*Factor should be < 1.0.*decay_rate 10"),
        ({"sched": "cosine", "lr": 0.01, "min_lr": 0.1}, r"min_lr: 0.1 is above the peak learning rate 0.01"),
        ({"sched": "tanh", "lr_base": 1e-7, "min_lr": 1e-6}, r"min_lr: 1e-06 is above the peak learning rate 1.25e-08"),
        ({"sched": "cosine", "lr_cycle_mul": 0.5, "epochs": 2, "warmup_epochs": 0, "sched_on_updates": True},
         r"sched: cosine gives no .*lr_cycle_mul 0.5"),
        ({"sched": "tanh", "epochs": 2, "warmup_epochs": 0, "lr_cycle_mul": 1.9, "lr_cycle_limit": 100},
         r"lr_cycle_limit: 100 cycles, the first of 2 epochs and each 1.9 times .*, are 1.67e\+28 epochs; at most"),
        ({"sched": "cosine", "epochs": 10, "lr_cycle_mul": 1.0, "lr_cycle_limit": 30_000}, "are 3e.05 epochs; at most"),
        ({"sched": "poly", "lr": 1e-6}, r"min_lr: 1e-05 is above .* set min_lr to 1e-06 or less"),
    ],
)  # fmt: skip
def test_a_schedule_that_would_end_the_run_later_is_refused_at_once(settings, expected, dummy):
    cfg = config_from(settings)
    optimizer = make_optimizer(cfg, dummy)
    before = [dict(group, params=None) for group in optimizer.param_groups]
    with pytest.raises(UserError, match=expected):
        make_schedule(cfg, optimizer, 4)
    assert [dict(group, params=None) for group in optimizer.param_groups] == before


@pytest.mark.parametrize(
    "noise", [{"lr_noise_pct": 0}, {"lr_noise_std": 1e300}, {"lr_noise_pct": 0.001}, {"lr_noise_pct": 2}]
)
def test_noise_that_is_never_small_enough_is_refused(noise):
    with pytest.raises(UserError, match=next(iter(noise))):
        config_from({"lr_noise": [0.0]} | noise)


def test_the_widest_noise_that_is_allowed_comes_to_an_end(dummy):
    cfg = config_from(
        {"sched": "cosine", "lr": 0.1, "lr_noise": [0.0], "lr_noise_pct": 0.01, "lr_noise_std": 10, "epochs": 20}
    )
    assert all(0 < rate < 0.102 for rate in rates(cfg, dummy)[4:])


def test_learning_rate_noise_is_drawn_by_seed_and_epoch(dummy):
    """Normal, drawn again where it is beyond the limit; as a share of the rate."""
    noise = {"lr_noise": [0.3], "lr_noise_pct": 0.5, "lr_noise_std": 0.8, "seed": 11}
    plain = {"sched": "cosine", "lr": 0.1, "epochs": 10, "warmup_epochs": 2, "cooldown_epochs": 0}
    expected = rates(config_from(plain), dummy)
    for epoch in range(3, 10):
        generator = torch.Generator().manual_seed(11 + epoch)
        drawn = (0.8 * torch.randn(1, generator=generator).item() for _ in range(99))
        expected[epoch] *= 1 + next(share for share in drawn if abs(share) < 0.5)
    assert rates(config_from(plain | noise), dummy) == pytest.approx(expected)


def test_the_learning_rate_scales_with_the_samples_of_an_update(dummy):
    cfg = {"lr": 7.0, "lr_base": 0.1, "lr_base_size": 64, "batch_size": 32, "grad_accum_steps": 2}
    assert peak_learning_rate(config_from({"lr": 7.0}), 4) == 7.0
    assert peak_learning_rate(config_from(cfg), 4) == pytest.approx(0.1 * 32 * 4 * 2 / 64)
    assert peak_learning_rate(config_from(cfg | {"lr_base_scale": "sqrt"}), 4) == pytest.approx(0.1 * 2)
    assert learning_rate(make_optimizer(config_from(cfg), dummy, 4)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("opt", "kind"), [("lamb", "Lamb"), ("AdamW", "AdamW"), ("lookahead_adamw", "Lookahead"), ("sgd", "SGD")]
)
def test_opt_chooses_the_optimizer(opt, kind, dummy):
    assert type(make_optimizer(config_from({"opt": opt}), dummy)).__name__ == kind
