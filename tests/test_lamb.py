"""LAMB with its count on the device: timm's updates, and none where a flag says so."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.optim import Lamb
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from utils.config.parse import config_from
from utils.run.precision import Precision
from utils.train.lamb import DeviceLamb
from utils.train.optim import make_optimizer

CPU = torch.device("cpu")


def parameters(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 3, 3), (5, 4), (7,), (3,))
    return [nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)) for shape in shapes]


def groups(values):
    return [dict(params=values[:2], weight_decay=0.05), dict(params=values[2:], weight_decay=0.0)]


def train(optimizer, values, steps, seed=1):
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in values[:-1]:  # the last one never has a gradient
            p.grad = 3 * torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, dict(trust_clip=True, always_adapt=True), dict(bias_correction=False, grad_averaging=False)],
    ids=str,
)
def test_updates_are_those_of_timm(dtype, options):
    plain, own = parameters(dtype), parameters(dtype)
    train(Lamb(groups(plain), lr=0.01, **options), plain, 6)
    train(DeviceLamb(groups(own), lr=0.01, **options), own, 6)
    # The order of roundings differs.
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("resumed", [Lamb, DeviceLamb])
def test_either_goes_on_from_the_state_of_the_other(resumed):
    values = parameters()
    optimizer = ({Lamb, DeviceLamb} - {resumed}).pop()(groups(values), lr=0.01)
    train(optimizer, values, 3)
    others = copy.deepcopy(values)
    other = resumed(groups(others), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, values, 3, seed=2)
    train(other, others, 3, seed=2)
    torch.testing.assert_close(others, values, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_loss_scaling_leaves_an_update_out_without_asking(bad, monkeypatch):
    values = parameters()
    optimizer = DeviceLamb(groups(values), lr=0.01)
    train(optimizer, values, 2)
    before = copy.deepcopy((values, optimizer.state_dict()))
    precision = Precision(config_from({}), CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision.scaler.scale(torch.ones(()))
    for p in values[:-1]:
        p.grad = torch.ones_like(p) * 8
    if bad is not None:
        values[1].grad[0, 0] = bad
    monkeypatch.setattr(torch.Tensor, "item", None)  # the host reads nothing
    precision.update(optimizer, nn.ParameterList(values))
    same = [torch.equal(p, old) for p, old in zip(values[:-1], before[0], strict=False)]
    assert same == [bad is not None] * 3
    steps = [int(state["param_groups"][0]["step"]) for state in (before[1], optimizer.state_dict())]
    assert steps == ([2, 2] if bad is not None else [2, 3])
    if bad is None:
        expected = copy.deepcopy(before[0])
        plain = Lamb(groups(expected), lr=0.01)
        plain.load_state_dict(before[1])
        for p in expected[:-1]:
            p.grad = torch.ones_like(p)
        monkeypatch.undo()
        plain.step()
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-6)
    else:
        torch.testing.assert_close(optimizer.state_dict()["state"], before[1]["state"], rtol=0, atol=0)


@pytest.mark.parametrize(("device", "kind"), [("cpu", Lamb), ("cuda", DeviceLamb)])
def test_it_is_the_lamb_of_cuda(device, kind):
    with FakeTensorMode(), torch.device(device):
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(config_from({"opt": "lamb", "weight_decay": 0.1, "opt_eps": 1e-5}), model)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
