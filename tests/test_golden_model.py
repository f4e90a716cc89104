"""The model is the published one: forward, gradients, statistics and firing rates in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import FORWARD_FILES, load_json, load_tensors, model_arguments, relative_error, under

from model import sdt
from module.accelerate import accelerate
from utils.train.losses import TETLoss

# The golden data's README: logits and gradients agree to 1e-9 relative in float64.
TOLERANCE = 1e-9
# A bias in front of a BatchNorm is subtracted again with the mean: its gradient is exactly 0, and both sides hold
# rounding noise (around 1e-16), which depends on the version of torch and has no relative error worth the name.
CANCELLED_BY_BATCH_NORM = (".proj_conv.bias", ".fc1_conv.bias", ".fc2_conv.bias")
ZERO = 1e-12


# `plain` is what module/ says, on SpikingJelly's torch code; `auto` has every substitute attached, and `lean` the
# neurons of a machine without compiler.
@pytest.fixture(params=[(name, backend) for name in FORWARD_FILES for backend in ("plain", "auto", "lean")], ids=str)
def golden(request):
    name, backend = request.param
    meta, tensors = load_tensors(name)
    model = sdt(**model_arguments(meta["cfg"])).double()
    model.load_state_dict(under(tensors, "state"), strict=True)
    if backend != "plain":
        accelerate(model, neuron_backend=backend, prove=False)  # compared with the published numbers themselves
    return meta, tensors, model


def test_eval_logits_and_firing_rates_are_the_published_ones(golden):
    _, tensors, model = golden
    with torch.no_grad():
        logits, hook = model.eval()(tensors["input"], hook={})
    assert relative_error(logits, tensors["eval/logits"]) < TOLERANCE
    rates = under(tensors, "eval/rate")
    assert rates
    assert set(hook) == set(rates)
    for name, spikes in hook.items():
        over_batch = tuple(range(1, spikes.dim()))
        assert relative_error(spikes.mean(over_batch), rates[name]) < TOLERANCE, name
        nonzero = (spikes != 0).double().mean(over_batch)
        assert relative_error(nonzero, tensors[f"eval/nonzero/{name}"]) < TOLERANCE, name


def test_training_step_has_the_published_loss_gradients_and_statistics(golden):
    meta, tensors, model = golden
    logits, _ = model.train()(tensors["input"])
    if meta["cfg"]["TET"]:
        loss = TETLoss(torch.nn.CrossEntropyLoss(), means=1.0, lamb=0.001)(logits, tensors["target"])
    else:
        loss = F.cross_entropy(logits, tensors["target"])
    loss.backward()

    assert relative_error(logits.detach(), tensors["train/logits"]) < TOLERANCE
    assert relative_error(loss.detach(), tensors["train/loss"]) < TOLERANCE
    gradients = under(tensors, "train/grad")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(gradients)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        if name.endswith(CANCELLED_BY_BATCH_NORM):
            assert max(parameter.grad.abs().max(), gradients[name].abs().max()) < ZERO, name
            continue
        assert relative_error(parameter.grad, gradients[name]) < TOLERANCE, name
    buffers = dict(model.named_buffers())
    after = under(tensors, "train/after")
    assert after
    for name, expected in after.items():
        assert relative_error(buffers[name], expected) < TOLERANCE, name


@pytest.mark.parametrize("config", load_json("state_dicts"))
def test_state_dict_keys_shapes_and_parameter_count_are_the_published_ones(config):
    golden = load_json("state_dicts")[config]
    settings = load_json("cli_defaults") | load_json("configs")[config]["set"]
    with torch.device("meta"):
        model = sdt(
            img_size_h=settings["img_size"],
            img_size_w=settings["img_size"],
            in_channels=settings["in_channels"],
            num_classes=settings["num_classes"],
            embed_dims=settings["dim"],
            num_heads=settings["num_heads"],
            mlp_ratios=settings["mlp_ratio"],
            depths=settings["layer"],
            T=settings["time_steps"],
            pooling_stat=settings["pooling_stat"],
            spike_mode=settings["spike_mode"],
            TET=settings["TET"],
        )
    actual = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.state_dict().items()]
    assert sorted(actual) == sorted(golden["keys"])
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
