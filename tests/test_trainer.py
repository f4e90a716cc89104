"""One run's trainer, built in this process: what it evaluates, judges, averages and resumes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import yaml
from tiny import TINY_RUN, lively

import model as _models  # noqa: F401 -- registers the models
from utils.config.parse import config_from
from utils.errors import NonFiniteError
from utils.run.build import build_model, prepare_for_training
from utils.run.distributed import Process
from utils.run.evaluation import EvalResult
from utils.run.precision import Precision
from utils.run.reproduce import seed_step
from utils.train import trainer as trainer_module
from utils.train.checkpoint_store import BEST, LAST, RECOVERY, read_checkpoint
from utils.train.optim import learning_rate
from utils.train.step import EpochSums, TrainResult, make_step
from utils.train.trainer import Trainer

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
TRAINED = TrainResult(loss=1.0, images_per_second=1.0)


def settings(**values):
    """The smallest run on plain code, with `values`."""
    usual = {"cooldown_epochs": 0, "hflip": 0.0, "workers": 0, "device": "cpu", "kernels": "plain", "epochs": 3}
    return config_from(yaml.safe_load(TINY_RUN) | usual | values)


@pytest.fixture
def build(tmp_path):
    def make(process=ALONE, **values):
        return Trainer(settings(**values), process, tmp_path)

    return make


def result(top1, loss=1.0):
    return EvalResult(loss=loss, top1=top1, top5=100.0, samples=360, seconds=1.0)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def one_batch(trainer):
    trainer.loaders.set_epoch(0)
    return next(iter(trainer.loaders.train))


def test_the_average_moves_once_per_update_by_its_decay(build):
    trainer = build(model_ema=True, model_ema_decay=0.75)
    before = weights(trainer.state.model)
    assert_equal(weights(trainer.state.ema.module), before)
    trainer.train_step(0).run(*one_batch(trainer), 0, 0)
    after, average = weights(trainer.state.model), weights(trainer.state.ema.module)
    assert not torch.equal(after["head.weight"], before["head.weight"])
    for name, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(value, after[name])


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_average_lies_on_the_host_where_that_is_asked_for(build, monkeypatch):
    made = []
    monkeypatch.setattr(trainer_module, "ModelEmaV3", lambda model, **arguments: made.append(arguments))
    for on_host in (True, False):
        build(model_ema=True, model_ema_decay=0.5, model_ema_force_cpu=on_host)
    assert made == [{"decay": 0.5, "device": device} for device in (CPU, None)]


@pytest.mark.parametrize(
    ("metric", "best", "expected"),
    [("top1", {"ema": 30.0, "eval": 10.0}, [10.0, 30.0, 20.0]), ("loss", {"ema": 3.0, "eval": 1.0}, [1.0, 3.0, 2.0])],
)
def test_the_average_decides_which_epoch_is_the_best(build, tmp_path, metric, best, expected):
    trainer = build(model_ema=True, eval_metric=metric)
    of_average, of_weights = expected, expected[::-1]
    with trainer.files():
        for epoch in range(3):
            found = [result(values[epoch], loss=values[epoch]) for values in (of_weights, of_average)]
            trainer.finish(epoch, TRAINED, dict(zip(("eval", "ema"), found, strict=True)))
    best_epoch = 0 if metric == "loss" else 1
    assert trainer.store.best == (expected[best_epoch], best_epoch)
    assert read_checkpoint(tmp_path / BEST)["epoch"] == best_epoch


def test_each_epoch_has_its_own_learning_rate(build):
    trainer = build(sched="cosine", lr=0.005, min_lr=1e-5, warmup_epochs=0)
    found = []
    with trainer.files():
        for epoch in range(3):
            found.append(learning_rate(trainer.state.optimizer))
            trainer.finish(epoch, TRAINED, {"eval": result(1.0)})
    cosine = [1e-5 + (0.005 - 1e-5) / 2 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
    assert found == pytest.approx(cosine, rel=1e-9)


def test_the_plateau_schedule_hears_the_metric_of_the_epoch(build):
    options = dict(sched="plateau", patience_epochs=0, decay_rate=0.5, lr=0.008, warmup_epochs=0, eval_metric="loss")
    for losses, expected in (([3.0, 2.0, 1.0], [0.008] * 3), ([1.0, 2.0, 3.0], [0.008, 0.008, 0.004])):
        trainer, found = build(**options), []
        with trainer.files():
            for epoch, loss in enumerate(losses):
                found.append(learning_rate(trainer.state.optimizer))
                trainer.finish(epoch, TRAINED, {"eval": result(1.0, loss=loss)})
        assert found == pytest.approx(expected)


def test_a_resumed_run_goes_on_with_schedule_scaler_and_history(build, tmp_path):
    options = dict(sched="plateau", patience_epochs=0, decay_rate=0.5, lr=0.008, lr_noise=[0.0], model_ema=True)

    def scaled(trainer):
        trainer.state.precision.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        return trainer

    trainer = scaled(build(**options))
    trainer.state.precision.scaler.load_state_dict(trainer.state.precision.scaler.state_dict() | {"scale": 16.0})
    with trainer.files():
        for epoch in (0, 1):
            trainer.finish(epoch, TRAINED, {"eval": result(5.0 - epoch), "ema": result(5.0 - epoch)})
    assert trainer.state.schedule.restore_lr  # the noise is on top of this
    again = scaled(build(**options))
    content = again.state.restore(tmp_path / LAST, again.cfg)
    again.store.resume(content)
    assert again.state.schedule.restore_lr == trainer.state.schedule.restore_lr
    assert again.state.schedule.lr_scheduler.state_dict() == trainer.state.schedule.lr_scheduler.state_dict()
    assert learning_rate(again.state.optimizer) == learning_rate(trainer.state.optimizer)
    assert again.state.precision.scaler.get_scale() == 16.0
    assert (again.store.history, again.store.best) == (trainer.store.history, trainer.store.best)
    assert_equal(weights(again.state.ema.module), weights(trainer.state.ema.module))
    assert build(**options, resume=str(tmp_path / LAST)).start_epoch == 2


@pytest.mark.parametrize(("engine", "times"), [("sparse", 2), ("dense", 0)])
def test_with_an_engine_weights_and_average_are_evaluated_on_it(build, monkeypatch, engine, times):
    seen = []
    monkeypatch.setattr(trainer_module, "for_evaluation", lambda model: seen.append(model) or model)
    trainer = build(model_ema=True, engine=engine)
    trainer._finished = EpochSums(CPU)
    with trainer.files():
        trainer.evaluate(0)
    assert seen == [trainer.state.model, trainer.state.ema.module][:times]


def test_settings_of_the_engine_reach_its_layers(build):
    for engine, bf16 in (("sparse", True), ("auto", False)):
        model = build(engine=engine, bf16_input_grad=bf16, kernels="auto").state.model
        layers = [module for module in model.modules() if hasattr(module, "bf16_input_grad")]
        assert len(layers) == 4 + 6
        assert {(layer.auto, layer.bf16_input_grad) for layer in layers} == {(engine == "auto", bf16)}


def test_linear_probing_trains_the_head_only(build):
    """Nothing else: no running statistic, and no parameter of the neurons, those in front of the head included."""
    trainer = build(linear_prob=True, spike_mode="plif")
    lively(trainer.state.model)  # so that parameters of neurons would have gradients
    before = weights(trainer.state.model)
    batches = [one_batch(trainer)]
    trainer_module.train_one_epoch(trainer.train_step(0), batches, 1, ALONE)
    changed = {name for name, value in trainer.state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["initial_checkpoint", "resume"])
def test_first_weights_come_from_the_file_that_is_named(build, tmp_path, name):
    other = build(seed=9)
    with other.files():  # writes the state before the first step
        pass
    options = {"no_resume_opt": True} if name == "resume" else {}
    trainer = build(seed=4, **{name: str(tmp_path / RECOVERY)}, **options)
    assert trainer.start_epoch == 0
    assert_equal(weights(trainer.state.model), weights(other.state.model))
    assert not torch.equal(weights(build(seed=4).state.model)["head.weight"], weights(other.state.model)["head.weight"])


def test_batch_norm_has_the_momentum_and_epsilon_of_the_settings():
    model = build_model(settings(bn_momentum=0.2, bn_eps=1e-3))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.2, 1e-3)}
    plain = [m for m in build_model(settings()).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in plain} == {(0.1, 1e-5)}


def test_each_rank_epoch_and_step_draws_its_own_random_numbers():
    """Else all processes would mix their batches alike."""
    cfg = settings(mixup=0.5, seed=5)
    model, _ = prepare_for_training(cfg, build_model(cfg), ALONE, Precision(cfg, CPU))
    state = trainer_module.RunState(model, torch.optim.SGD(model.parameters(), lr=0.1), None, Precision(cfg, CPU), None)
    drawn = {}
    for rank in (0, 1):
        for epoch in (0, 1):
            step = make_step(cfg, epoch, model, state, [], Process(rank, 2, CPU))
            for number in (0, 1):
                step.seed(number)
                drawn[rank, epoch, number] = (float(np.random.rand()), float(torch.rand(())))
                seed_step(5, epoch, number, rank)
                assert drawn[rank, epoch, number] == (float(np.random.rand()), float(torch.rand(())))
    assert len(set(drawn.values())) == 8


def test_mixup_and_accumulation_reach_the_step_and_mixup_ends(build):
    trainer = build(mixup=0.5, mixup_off_epoch=1, smoothing=0.2, grad_accum_steps=2, batch_size=120)
    first, second = trainer.train_step(0), trainer.train_step(1)
    assert first.mixup is not None
    assert second.mixup is None
    assert isinstance(second.loss_fn, trainer_module.nn.Module)
    assert [type(step.loss_fn).__name__ for step in (first, second)] == [
        "SoftTargetCrossEntropy", "LabelSmoothingCrossEntropy"]  # fmt: skip
    assert first.accumulate == second.accumulate == 2


def test_the_learning_rate_of_the_batch_is_told(build, caplog):
    trainer = build(lr=0.3, lr_base=0.01, lr_base_size=480)
    with caplog.at_level("INFO"):
        trainer.describe()
    assert "peak learning rate 0.005, lr_base 0.01 scaled with it" in caplog.text
    assert learning_rate(trainer.state.optimizer) == pytest.approx(0.005)


def test_a_named_size_is_saved_with_its_sizes(tmp_path):
    named = settings(model="sdt_2_256", layer=1, dim=16, num_heads=2)
    trainer = Trainer(named, ALONE, tmp_path)
    with trainer.files():
        saved = read_checkpoint(tmp_path / RECOVERY)
    config = saved["config"]
    assert (config["model"], config["layer"], config["dim"], config["pooling_stat"]) == ("sdt_2_256", 1, 16, "0011")
    build_model(config_from(config)).load_state_dict(saved["state_dict"], strict=True)
    whole = Trainer(config_from(named.as_dict() | {"layer": 8, "dim": 512}), ALONE, tmp_path).cfg
    assert (whole.layer, whole.dim) == (8, 512)


def test_a_state_that_is_not_finite_is_not_saved(build, tmp_path):
    trainer = build()
    with trainer.files():
        good = (tmp_path / RECOVERY).read_bytes()
        with torch.no_grad():
            copy.copy(trainer.state.model).patch_embed.proj_bn.running_var[0] = math.inf
        with pytest.raises(NonFiniteError, match="running_var is no longer finite, so this state is not saved"):
            trainer.finish(0, TRAINED, {"eval": result(1.0)})
    assert (tmp_path / RECOVERY).read_bytes() == good
