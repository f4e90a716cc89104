"""The merged form of V2: the same spikes, one convolution per pair of neurons, and only spikes enter it."""

from __future__ import annotations

import copy
import logging
import types

import pytest
import torch
from golden import load_json
from golden_v2 import FORWARD_FILES, golden_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from model import sdt_v2
from module.fingerprint import fingerprint, found
from module.folding import _ORDER
from module.v2.conv import SeparableConv
from module.v2.repconv import BorderedBatchNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FORWARD_FILES)
def test_no_spike_of_the_golden_models_changes(name, dtype):
    tensors, model = golden_model(name)
    x = tensors["input"].to(dtype)
    model = model.to(dtype).eval()
    merged = copy.deepcopy(model).fuse()
    hooks = ({}, {})
    with torch.no_grad():
        logits, _ = model(x, hooks[0])
        again, _ = merged(x, hooks[1])
    assert list(hooks[0]) == list(hooks[1])
    for path, spikes in hooks[0].items():
        assert torch.equal(spikes, hooks[1][path]), path
    # From the same spikes the head gives the same logits, to the last bit.
    assert torch.equal(again, logits)
    assert not any(isinstance(layer, _BatchNorm) for layer in merged.modules())


def test_only_spikes_enter_every_convolution_after_the_first_one():
    tensors, model = golden_model("t2_full_depth")
    entered: dict[str, set[str]] = {"trained": set(), "merged": set()}

    def watch(form, name):
        def hook(layer, args):
            if set(args[0].unique().tolist()) - {0.0, 1.0}:
                entered[form].add(name)

        return hook

    for form, network in (("trained", model.eval()), ("merged", copy.deepcopy(model).eval().fuse())):
        for name, layer in network.named_modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                layer.register_forward_pre_hook(watch(form, name))
        network(tensors["input"])
    assert entered["merged"] == {"downsample1_1.encode_conv"}
    inner = {name for name in entered["trained"] if name.endswith((".pwconv2", ".body.2.0", ".body.2.1"))}
    assert entered["trained"] == inner | {"downsample1_1.encode_conv"}
    assert len(inner) == 4 + 8 * 4 * 2


def test_the_merged_layers_have_the_published_sizes():
    golden = load_json("v2/macs_v2")["sdt_v2_15m"]["macs_merged"]
    with torch.device("meta"):
        model = sdt_v2(embed_dims=(64, 128, 256, 360)).eval().fuse()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))}
    assert list(layers) == [name.removesuffix("+pwconv2") for name in golden]


def test_a_part_with_an_edited_method_stays_and_one_line_says_so(monkeypatch, caplog):
    def edited(self, x):
        return self.bn2(self.pwconv2(self.lif2(self.dwconv(x.flatten(0, 1))))).unflatten(0, x.shape[:2])

    def build():
        return sdt_v2(embed_dims=(4, 8, 8, 8), depths=(1, 1), num_heads=2).eval()

    for change in ("of the class", "of one part"):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "sdt"):
            caplog.clear()
            model = build()
            part = model.ConvBlock1_2[0].Conv
            if change == "of the class":
                patch.setattr(SeparableConv, "forward", edited)
            else:
                part.forward = types.MethodType(edited, part)
            model.fuse()
        (line,) = [record.message for record in caplog.records]
        assert "SeparableConv stays as it is" in line
        assert "module.v2.conv:SeparableConv.forward" in line
        assert isinstance(part.bn2, nn.BatchNorm2d)
        assert part.dwconv.groups > 1
        other = model.ConvBlock1_1[0].Conv
        assert isinstance(other.bn2, nn.Identity) == (change == "of one part")
    monkeypatch.setattr(BorderedBatchNorm, "border", lambda self: torch.zeros(()))
    kept = build().fuse().block3[0].attn.q_conv
    assert isinstance(kept[1], nn.BatchNorm2d), "its border is no longer that of the merged form"


def test_what_folding_relies_on_is_the_code_as_it_was_written():
    now = {kind: {name: fingerprint(getattr(*found(name))) for name in order} for kind, order in _ORDER.items()}
    assert now == _ORDER, "a plain method changed: see that folding still holds, then change its fingerprint"


class WithNeuron(SeparableConv):
    """One more neuron, between the depthwise and the 1x1 convolution."""


def test_derived_parts_stay_and_training_mode_is_refused():
    model = sdt_v2(embed_dims=(4, 8, 8, 8), depths=(1, 1), num_heads=2)
    with pytest.raises(ValueError, match="only be folded in evaluation mode"):
        model.fuse()
    model.ConvBlock1_2[0].Conv.__class__ = WithNeuron
    model.eval().fuse()
    assert isinstance(model.ConvBlock1_2[0].Conv.bn2, nn.BatchNorm2d)
    assert isinstance(model.ConvBlock1_1[0].Conv.bn2, nn.Identity)
    twice = copy.deepcopy(model).fuse()
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(twice(x)[0], model(x)[0], rtol=0, atol=0)
