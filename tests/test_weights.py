"""Tensors that cannot be weights are refused, each kind by its own message, and nothing of the file is loaded."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.run.checkpoint import load_weights
from utils.run.partial import load_partial
from utils.run.weights import weights_in


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))


def infinite(value, draw):
    value = value.clone()
    value.view(-1)[draw.randrange(value.numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])
    return value


FAULTS = {
    "has values that are NaN or infinite": infinite,
    "has the wrong kind of numbers": lambda value, draw: value.to(
        draw.choice([torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
    ),
    "is sparse, quantized or without values": lambda value, draw: draw.choice([value.to_sparse(), value.to("meta")]),
}


@pytest.mark.parametrize("load", [load_weights, load_partial])
@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("what", FAULTS)
def test_values_that_are_no_weights_are_refused(tmp_path, what, use_ema, load):
    if load is load_partial and use_ema:
        return
    draw = random.Random(what)
    for _ in range(8):
        weights = dict(net().state_dict())
        key = draw.choice([key for key, value in weights.items() if value.is_floating_point()])
        wrong = weights | {key: FAULTS[what](weights[key], draw)}
        pair = (weights, wrong) if use_ema else (wrong, weights)
        torch.save({"state_dict": pair[0], "state_dict_ema": pair[1]}, tmp_path / "a.pth")
        model = net()
        for value in model.state_dict().values():
            value.zero_()
        with pytest.raises(UserError, match=what) as caught:
            load(model, tmp_path / "a.pth", **({"use_ema": True} if use_ema else {}))
        assert key in str(caught.value)
        assert "nothing was loaded" in str(caught.value)
        assert not any(bool(value.any()) for value in model.state_dict().values())


def test_a_number_that_overflows_in_the_model_is_not_finite(tmp_path):
    torch.save(
        net().double().state_dict() | {"0.bias": torch.full((3,), 1e300, dtype=torch.float64)}, tmp_path / "a.pth"
    )
    with pytest.raises(UserError, match=r"0\.bias has values that are NaN or infinite"):
        load_weights(net(), tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_real_numbers_are_taken(tmp_path, dtype):
    torch.save(net().to(dtype).state_dict(), tmp_path / "a.pth")
    model = net()
    load_weights(model, tmp_path / "a.pth")
    assert model[0].weight.dtype is torch.float32
    torch.testing.assert_close(model[0].weight, net()[0].weight, rtol=1e-2, atol=1e-3)


def test_a_negative_variance_is_refused(tmp_path):
    torch.save(net().state_dict() | {"1.running_var": torch.tensor([1.0, -1e-3, 1.0])}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"1\.running_var has negative values, and no variance is negative"):
        load_weights(net(), tmp_path / "a.pth")


def test_a_counter_that_is_a_fraction_is_refused(tmp_path):
    torch.save(net().state_dict() | {"1.num_batches_tracked": torch.tensor(0.5)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"1\.num_batches_tracked \(float32\) has the wrong kind of numbers"):
        load_weights(net(), tmp_path / "a.pth")


def test_two_keys_that_become_one_without_the_prefix_are_refused():
    with pytest.raises(UserError, match=r"has weights twice, with the prefix 'module\.' and without it: module\.w;"):
        weights_in({"w": torch.zeros(1), "module.w": torch.ones(1)}, "a.pth")


def test_keys_that_are_no_text_are_refused():
    with pytest.raises(UserError, match="a key of its weights is 3; the names of weights are texts"):
        weights_in({"state_dict": {3: torch.zeros(1)}}, "a.pth")
