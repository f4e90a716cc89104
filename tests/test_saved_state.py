"""Each field of a checkpoint that a run goes on from is checked: type, range, and the moments of the optimizer."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.train.moments import load_moments
from utils.train.saved_state import saved_state

HERE = Path("last.pth.tar")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def trained(steps=2, kind=torch.optim.AdamW):
    """A model and its optimizer after some updates."""
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def content(**fields):
    whole = {
        "epoch": 3,
        "optimizer": trained()[1].state_dict(),
        "progress": {"steps": 2, "loss_sums": [1.5, 2.0], "samples": [4.0, 4.0]},
        "history": [(50.0, 1), (float("nan"), 0)],
        "best": (50.0, 1),
        "config": {"lr": 0.1},
        "amp_scaler": {},
        "parts": [("Conv2d", 3, "plain", "")],
    }
    return {key: value for key, value in (whole | fields).items() if value is not ...}


def test_a_whole_state_is_taken():
    saved = saved_state(content(), HERE)
    assert (saved.position, saved.best, len(saved.history)) == ((3, 2), (50.0, 1), 2)
    saved = saved_state(content(progress=..., history=..., best=None, config=..., parts=...), HERE)
    assert saved.position == (4, 0)


GARBAGE = [None, True, "text", b"bytes", 1.5, -1, 10**5000, float("inf"), [], [1], {}, {"a": 1}, {1: 2}, (1, 2, 3),
           torch.zeros(2)]  # fmt: skip
# What a field may be beside its usual form.
FITS = {
    "epoch": [],
    "optimizer": [],
    "progress": [None],
    "history": [None, []],
    "best": [None],
    "config": [None, {}, {"a": 1}],
    "amp_scaler": [None, {}],
    "parts": [None, []],
}


@pytest.mark.parametrize("field", FITS)
def test_a_field_of_another_type_or_range_is_named(field):
    for value in GARBAGE:
        if any(type(value) is type(fit) and value == fit for fit in FITS[field]):
            saved_state(content(**{field: value}), HERE)
            continue
        with pytest.raises(UserError, match=f"^checkpoint last.pth.tar: {field}") as caught:
            saved_state(content(**{field: value}), HERE)
        assert "\n" not in str(caught.value)
        assert "; the file is damaged" in str(caught.value)


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        ({"steps": 2, "loss_sums": [1.0]}, r"progress\.samples: field required"),
        ({"steps": -2, "loss_sums": [1.0], "samples": [1.0]}, r"progress\.steps is -2: it should be greater than or"),
        ({"steps": 2, "loss_sums": [float("nan")], "samples": [1.0]}, r"progress\.loss_sums\.0 is nan: "),
        ({"steps": 2, "loss_sums": [], "samples": []}, r"progress\.loss_sums is \[\]"),
        ({"steps": 2, "loss_sums": [1.0], "samples": [1.0, 2.0]}, "loss_sums and samples differ in length"),
    ],
)
def test_a_place_in_an_epoch_is_checked(progress, message):
    with pytest.raises(UserError, match=message):
        saved_state(content(progress=progress), HERE)


def load(optimizer_state, **fields):
    _, optimizer = trained(0)
    load_moments(optimizer, optimizer_state, saved_state(content(optimizer=optimizer_state, **fields), HERE), HERE)
    return optimizer


def test_moments_are_loaded_and_go_on():
    model, optimizer = trained()
    other = net()
    other.load_state_dict(model.state_dict())
    again = torch.optim.AdamW(other.parameters(), lr=0.1)
    load_moments(again, copy.deepcopy(optimizer.state_dict()), saved_state(content(), HERE), HERE)
    for net_, optimizer_ in ((model, optimizer), (other, again)):
        net_(torch.ones(1, 3)).sum().backward()
        optimizer_.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_moments_of_another_shape_kind_or_without_value_are_refused():
    draw = random.Random(0)
    for _ in range(30):
        state = copy.deepcopy(trained()[1].state_dict())
        number = draw.randrange(4)
        name = draw.choice(["exp_avg", "exp_avg_sq", "step"])
        state["state"][number][name] = draw.choice(
            [torch.zeros(7), torch.zeros(1, 1, 1), float("nan") * torch.ones_like(state["state"][number][name]), None,
             "text", state["state"][number][name].long(), state["state"][number][name].to_sparse()]
        )  # fmt: skip
        with pytest.raises(UserError, match=f"'{name}' of the optimizer's parameter {number} (has|is) .*no-resume-opt"):
            load(state)


def test_missing_moments_are_refused():
    state = trained()[1].state_dict()
    del state["state"][2]["exp_avg"]
    with pytest.raises(UserError, match="'exp_avg' of the optimizer's parameter 2 is missing"):
        load(state)
    with pytest.raises(UserError, match="its optimizer has no moments after epoch 4, step 2"):
        load(state | {"state": {}})
    load(state | {"state": {}}, epoch=0, progress={"steps": 0, "loss_sums": [0.0], "samples": [0.0]})
    with pytest.raises(UserError, match="it has moments of parameter 9, which is none"):
        load(state | {"state": {9: {"step": torch.tensor(1.0)}}})
    with pytest.raises(UserError, match=r"has groups of \[4\] parameters, the model's of \[4\]|groups of \[3\]"):
        load({"state": {}, "param_groups": [{**state["param_groups"][0], "params": [0, 1, 2]}]})


def test_missing_moments_of_one_parameter_are_refused_at_its_first_update():
    state = trained()[1].state_dict()
    del state["state"][1]
    optimizer = load(state)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(UserError, match="the optimizer's parameter 1 has no moments; take another checkpoint"):
        optimizer.step()
    # One that is never updated has none.
    optimizer = load(state)
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        parameter.grad = None if number == 1 else torch.ones_like(parameter)
    optimizer.step()
