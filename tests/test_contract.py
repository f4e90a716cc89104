"""A model of any kind: which settings it gets, what it must have, and what it is told where something is missing."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT
from timm.models import register_model
from torch import nn

import model as this_repository
from utils.config.parse import config_from
from utils.data.datasets import dataset_facts
from utils.errors import UserError
from utils.run.build import build_model, prepare_for_training, set_layout, with_sizes_of
from utils.run.contract import check_contract
from utils.run.distributed import Process
from utils.run.models import create_model, own_models
from utils.run.precision import Precision

CPU = torch.device("cpu")
DIGITS = {"dataset": "digits", "in_channels": 1, "num_classes": 10, "img_size": 8, "time_steps": 3}

SDT = {"in_channels": 1, "num_classes": 10, "embed_dims": 16, "depths": 1, "num_heads": 2, "pooling_stat": "0011"}


def settings(**values):
    return config_from(DIGITS | {"plugin": "test_contract.py"} | values)


class Smallest(nn.Module):
    """The least that a model must have."""

    def __init__(self, T=3, num_classes=10):
        super().__init__()
        self.T = T
        self.layer = nn.Linear(64, num_classes)
        self.drop = nn.Dropout()

    def logits(self, x):  # [B, 1, 8, 8] or [B, T, 2, H, W] -> [B, K]
        return self.drop(self.layer(x.flatten(1)[:, :64]))

    def forward(self, x):
        return self.logits(x), None


class Learns(Smallest):
    """Two heads in training, as for distillation."""

    def forward(self, x):
        logits = self.logits(x)
        return ((logits, logits) if self.training else logits), None


class PerStep(Smallest):
    def forward(self, x):
        return self.logits(x).expand(self.T, -1, -1), None


@register_model
def own_smallest(num_classes=10, T=3):
    return Smallest(T, num_classes)


@register_model
def own_asks_for_more(num_classes, width):
    return Smallest()


@register_model
def own_of_sdt(fault="", **given):
    if fault == "own":
        raise ValueError("a fault of the plugin itself")
    return this_repository.sdt(**given)


@register_model
def own_no_module():
    return 3


def test_a_model_of_the_repository_and_the_smallest_one_pass():
    check_contract(settings(), Smallest(), CPU)
    check_contract(settings(), Learns(), CPU)
    check_contract(settings(TET=True), PerStep(), CPU)
    check_contract(settings(dataset="digits-dvs", in_channels=2), Smallest(), CPU)
    check_contract(settings(), this_repository.sdt(**SDT), CPU)


def without(name):
    model = Smallest()
    delattr(model, name)
    return model


def having(base=Smallest, **attributes):
    return type("Changed", (base,), attributes)()


@pytest.mark.parametrize(
    ("model", "values", "expected"),
    [
        (without("T"), {}, "T is missing: set self.T"),
        (Smallest(T=0), {}, "T is 0: set self.T"),
        (Smallest(T="4"), {}, "T is '4': set self.T"),
        (having(forward=lambda self, x: self.logits(x)), {}, "forward returns a tensor [2, 10]; return (logits, hook)"),
        (having(forward=lambda self, x: (1, 2, 3)), {}, "forward returns a tuple of 3; return (logits, hook)"),
        (having(forward=lambda self, x: None), {}, "forward returns a value of type NoneType; return (logits, hook)"),
        (
            having(forward=lambda self, x: ((x, x), None)),
            {},
            "a tuple of 2 as logits; return a tensor (only in training",
        ),
        (having(forward=lambda self, x: (x > 0, None)), {}, "logits of torch.bool; return floating-point numbers"),
        (Smallest(num_classes=7), {}, "logits [2, 7] for a batch of B = 2; return [B, K]: [2, 10]"),
        (
            Smallest(),
            {"TET": True},
            "logits [2, 10] for a batch of B = 2; return [T, B, K], one for each time step, with",
        ),
        (PerStep(), {}, "logits [3, 2, 10] for a batch of B = 2; return [B, K]: [2, 10]"),
        (PerStep(T=5), {"TET": True}, "logits [5, 2, 10] for a batch of B = 2; return [T, B, K]"),
        (having(fuse=3), {}, "fuse is a value of type int; make it a method, or leave it out"),
        (
            having(spike_sources=lambda self: [1]),
            {},
            "spike_sources() returns a value of type list; return a dictionary",
        ),
        (
            having(spike_sources=lambda self: {"a": nn.ReLU()}),
            {},
            "spike_sources(): 'a' -> ReLU, which is no submodule",
        ),
    ],
)
def test_what_a_model_lacks_is_said(model, values, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        check_contract(settings(**values), model, CPU)


def test_all_that_is_missing_comes_in_one_message():
    model = having(forward=lambda self, x: self.logits(x), fuse=3)
    del model.T
    with pytest.raises(UserError) as caught:
        check_contract(settings(model="mine"), model, CPU)
    first, *lines = str(caught.value).splitlines()
    assert first == "model mine does not have what a model here needs (docs/extending.md lists it):"
    assert [line.split()[0] for line in lines] == ["T", "fuse", "forward"]


def test_the_check_leaves_the_model_and_the_random_state_as_they_were():
    model = having(logits=lambda self, x: self.layer(x.flatten(1)) + torch.rand(1))
    model.train()
    model.layer.eval()  # as a frozen part is
    state = torch.get_rng_state()
    check_contract(settings(), model, CPU)
    assert (model.training, model.layer.training, model.drop.training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_an_error_in_the_forward_pass_keeps_its_traceback_and_says_how_it_was_called():
    def forward(self, x):
        raise IndexError("my own")

    with pytest.raises(IndexError, match="my own") as caught:
        check_contract(settings(model="mine"), having(forward=forward), CPU)
    assert caught.value.__notes__ == ["This happened in a first forward pass of model mine, with input [2, 1, 8, 8]."]


def test_an_unknown_model_names_the_nearest_and_all_that_are_known():
    assert {"sdt", "sdt_8_512", "own_smallest"} <= set(own_models())
    assert not {"resnet18", "vit_tiny_patch16_224"} & set(own_models())
    with pytest.raises(UserError, match="did you mean own_smallest"):
        create_model(settings(model="own_smalest"))
    with pytest.raises(UserError, match=r"Valid: .*, sdt, .*, or one that a --plugin registers"):
        create_model(settings(model="zzz"))
    with pytest.raises(UserError, match=r"'resnet18' is one of timm's own models.* returns \(logits, hook\)"):
        create_model(settings(model="resnet18"))


def test_a_model_gets_what_its_signature_names_and_the_rest_is_told_in_one_line(caplog):
    cfg = settings(model="own_smallest", time_steps=2, dim=64, spike_mode="plif", neuron_args={"a": 1}, layer=4)
    with caplog.at_level(logging.WARNING):
        model = create_model(cfg)
    assert model.T == 2
    # Of the values given, those that differ from the default: layer 4 does not.
    assert [record.message for record in caplog.records] == [
        "warning: model own_smallest takes no dim, in_channels, spike_mode, neuron_args, so it does not get them"
    ]
    caplog.clear()
    create_model(settings(model="own_of_sdt", layer=1, dim=16, num_heads=2, pooling_stat="0011"))
    assert not caplog.records


def test_names_of_a_neuron_are_checked_when_the_model_is_built():
    with pytest.raises(UserError, match=r"model sdt: spike_mode='plf' is not one of lif, plif.*did you mean plif"):
        create_model(settings(spike_mode="plf"))
    with pytest.raises(UserError, match=r"model sdt: surrogate='sigmod' is not one of sigmoid"):
        create_model(settings(surrogate="sigmod"))
    with pytest.raises(UserError, match=r"neuron_args: lif has no argument tua"):
        create_model(settings(neuron_args={"tua": 2.0}))


def test_settings_of_the_neuron_reach_it():
    cfg = settings(layer=1, dim=16, num_heads=2, pooling_stat="0011", spike_mode="plif")
    model = build_model(config_from(cfg.as_dict() | {"surrogate": "atan", "surrogate_alpha": 3.0,
                                                     "neuron_args": {"init_tau": 4.0}}))  # fmt: skip
    neuron = model.head_lif
    assert (type(neuron).__name__, type(neuron.surrogate_function).__name__) == ("ParametricLIF", "ATan")
    assert neuron.surrogate_function.alpha == 3.0
    assert neuron.w.sigmoid().item() == pytest.approx(1 / 4.0)


def test_an_argument_without_a_setting_and_a_wrong_result_are_one_line():
    with pytest.raises(UserError, match=r"has arguments that no setting gives .*'width'.* give them a default"):
        create_model(settings(model="own_asks_for_more"))
    with pytest.raises(UserError, match="its function returns a value of type int; return a torch"):
        create_model(settings(model="own_no_module"))


def test_an_error_of_a_plugins_own_code_keeps_its_traceback(monkeypatch):
    with pytest.raises(UserError, match="own_of_sdt: embed_dims=20 must be a positive multiple of 8"):
        create_model(settings(model="own_of_sdt", dim=20))
    monkeypatch.setattr("utils.run.models.model_arguments", lambda cfg: {"fault": "own"})
    with pytest.raises(ValueError, match="a fault of the plugin itself") as caught:
        create_model(settings(model="own_of_sdt"))
    assert not isinstance(caught.value, UserError)


def test_optional_parts_are_optional():
    cfg = settings(model="own_smallest", layer=7)
    assert with_sizes_of(cfg, Smallest()) == cfg
    other = having(depths=[2, 2], embed_dims=48)  # another model's idea of depths
    assert (with_sizes_of(cfg, other).layer, with_sizes_of(cfg, other).dim) == (7, 48)
    process = Process(0, 1, CPU)
    prepare_for_training(cfg, Smallest(), process, Precision(cfg, process.device))
    for name, part in (("grad_checkpointing", "set_grad_checkpointing"), ("linear_prob", "no part called head")):
        asked = settings(model="own_smallest", **{name: True})
        with pytest.raises(UserError, match=f"{name}: model own_smallest has .*{part}.*; leave"):
            prepare_for_training(asked, Smallest(), process, Precision(asked, process.device))


@pytest.mark.parametrize("asked", [False, True])
def test_weights_have_channels_innermost_where_it_is_asked_for(asked):
    sizes = dict(layer=1, dim=16, num_heads=2, img_size=16)
    cfg, process = settings(model="sdt", **sizes, channels_last=asked), Process(0, 1, CPU)
    model, _ = prepare_for_training(cfg, build_model(cfg), process, Precision(cfg, CPU))
    assert model.patch_embed.proj_conv1.weight.is_contiguous(memory_format=torch.channels_last) == asked


@pytest.mark.parametrize(
    ("given", "device", "runs_as", "innermost"),
    [
        ({}, "cuda", "Triton kernels", True),
        ({}, "cuda", "plain", False),
        ({"amp": True}, "cuda", "plain", True),
        ({"amp": True}, "cpu", "compiled kernels", False),
        ({"channels_last": False}, "cuda", "Triton kernels", False),
        ({"channels_last": True}, "cpu", "plain", True),
    ],
    ids=str,
)
def test_channels_are_innermost_where_it_is_faster_unless_it_is_set(given, device, runs_as, innermost):
    model = nn.Conv2d(2, 2, 3)
    model.acceleration = [SimpleNamespace(runs_as=runs_as)]
    set_layout(settings(**given), model, torch.device(device))
    assert model.weight.is_contiguous(memory_format=torch.channels_last) == innermost


def test_the_loss_of_several_heads_is_the_mean_of_their_losses():
    from utils.config.settings import Config
    from utils.run.precision import Precision
    from utils.train.step import TrainStep

    model = Learns()
    model.drop.p = 0.0
    step = TrainStep(
        model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.0), Precision(Config(), CPU)
    )
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    expected = nn.functional.cross_entropy(model.logits(x), y)
    torch.testing.assert_close(step.run(x, y, 0, 0), expected)
    first, second = torch.randn(4, 10), torch.randn(4, 10)
    mean = (nn.functional.cross_entropy(first, y) + nn.functional.cross_entropy(second, y)) / 2
    torch.testing.assert_close(step._loss((first, second), y), mean)


def test_the_page_on_extending_names_what_the_protocol_does():
    page = (ROOT / "docs" / "extending.md").read_text()
    for name in ("spike_sources", "set_grad_checkpointing", "fuse", "reset_classifier", "no_weight_decay"):
        assert f"`{name}" in page, name


def test_a_wrong_data_set_is_answered_with_the_registered_ones():
    with pytest.raises(
        UserError, match=r"'digit' is unknown; valid: digits, .*, or one that a --plugin registers; did you"
    ):
        dataset_facts("digit")
