"""V2 is the published one: forward, gradients, statistics and firing rates in float64."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import load_json, relative_error, under
from golden_v2 import FORWARD_FILES, STATISTICS, TOLERANCE, golden_model, largest

from module.accelerate import accelerate

SIZES = load_json("v2/state_dicts_v2")


# `plain` is what module/ says, on SpikingJelly's torch code; `auto` has every substitute attached, and `lean` the
# neurons of a machine without compiler.
@pytest.fixture(params=[(name, backend) for name in FORWARD_FILES for backend in ("plain", "auto", "lean")], ids=str)
def golden(request):
    name, backend = request.param
    tensors, model = golden_model(name)
    if backend != "plain":
        accelerate(model, neuron_backend=backend, prove=False)  # compared with the published numbers themselves
    return tensors, model


def test_eval_logits_rates_and_membrane_values_are_the_published_ones(golden):
    tensors, model = golden
    means, squares = under(tensors, "eval/membrane_mean"), under(tensors, "eval/membrane_sq")
    found = {}
    handles = [
        (
            part[-1] if isinstance(part := model.get_submodule(name), torch.nn.ModuleList) else part
        ).register_forward_hook(lambda module, args, output, name=name: found.update({name: output}))
        for name in means
    ]
    with torch.no_grad():
        logits, hook = model.eval()(tensors["input"], hook={})
        for handle in handles:
            handle.remove()
        without, _ = model(tensors["input"])  # as it runs when nobody looks at a part
    assert relative_error(logits, tensors["eval/logits"]) < TOLERANCE
    assert relative_error(without, tensors["eval/logits"]) < TOLERANCE
    rates = under(tensors, "eval/rate")
    assert set(hook) == set(rates)
    for name, spikes in hook.items():
        over_batch = tuple(range(1, spikes.dim()))
        # Exact counts: only the last digit of a mean may differ.
        assert relative_error(spikes.mean(over_batch), rates[name]) < 1e-14, name
        nonzero = (spikes != 0).double().mean(over_batch)
        assert relative_error(nonzero, tensors[f"eval/nonzero/{name}"]) < 1e-14, name
    assert found.keys() == means.keys()
    for name, value in found.items():
        assert relative_error(value.mean(dim=(2, 3, 4)), means[name]) < TOLERANCE, name
        assert relative_error(value.square().mean(dim=(2, 3, 4)), squares[name]) < TOLERANCE, name


def test_training_step_has_the_published_loss_gradients_and_statistics(golden):
    tensors, model = golden
    logits, _ = model.train()(tensors["input"])
    if "teacher" in tensors:
        logits, logits_kd = logits
        assert relative_error(logits_kd.detach(), tensors["train/logits_kd"]) < TOLERANCE
        base = F.cross_entropy(logits, tensors["target"], label_smoothing=0.1)
        loss = 0.5 * base + 0.5 * F.cross_entropy(logits_kd, tensors["teacher"].argmax(1))
    else:
        loss = F.cross_entropy(logits, tensors["target"])
    loss.backward()

    assert relative_error(logits.detach(), tensors["train/logits"]) < TOLERANCE
    assert relative_error(loss.detach(), tensors["train/loss"]) < TOLERANCE
    gradients = under(tensors, "train/grad")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(gradients)
    scale = largest(gradients)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert float((parameter.grad - gradients[name]).abs().max()) < TOLERANCE * scale, name
    buffers = dict(model.named_buffers())
    after = under(tensors, "train/after")
    assert after
    for name, expected in after.items():
        assert relative_error(buffers[name], expected) < STATISTICS, name


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_same_weights_run_at_other_numbers_of_time_steps(steps):
    tensors, model = golden_model("t1_h2")
    model.T = steps
    with torch.no_grad():
        logits, _ = model.eval()(tensors["input"])
    assert relative_error(logits, tensors[f"sweep/logits/T{steps}"]) < TOLERANCE


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics():
    found = []
    for enable in (False, True):
        tensors, model = golden_model("t4_h4")
        model.train().set_grad_checkpointing(enable)
        F.cross_entropy(model(tensors["input"])[0], tensors["target"]).backward()
        found.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("kd", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_keys_shapes_and_parameter_counts_are_the_published_ones(name, kd):
    size = SIZES[name]
    expected = size["keys"] + (size["keys_added_by_kd"] if kd else [])
    for entry in filter(None, (name, size["published_function"])):
        with torch.device("meta"):
            model = timm.create_model(entry, kd=kd)
        found = [[key, list(v.shape), str(v.dtype).removeprefix("torch.")] for key, v in model.state_dict().items()]
        assert sorted(found) == sorted(expected)
        assert sum(p.numel() for p in model.parameters()) == size["params_with_kd" if kd else "params"]
        assert (model.T, model.num_heads, model.depths) == (1, 8, [6, 2])
