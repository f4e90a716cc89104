"""V2 as users build and call it: registry, arguments, errors, odd sizes, event frames, parts of one's own."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from golden import load_json
from golden_v2 import golden_model
from timm.models import register_model
from torch import nn

from model import MetaSpikeFormer, sdt_v2
from module.neuron import make_neuron, neurons_of
from module.v2.attention import Attention
from module.v2.block import TransformerBlock
from module.v2.conv import ConvBlock, DownSampling
from module.v2.mlp import MLP
from utils.config.parse import config_from
from utils.errors import UserError
from utils.run.batchnorm import convert_split_batchnorm, convert_sync_batchnorm
from utils.run.build import build_model, sizes_in_words, with_sizes_of

TINY = dict(embed_dims=[4, 8, 12, 16], num_heads=2, depths=[1, 1], num_classes=5)


def tiny(**changes):
    torch.manual_seed(0)
    return sdt_v2(**(TINY | changes))


def images(side=32, channels=3, batch=2):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def test_the_neurons_are_the_published_ones_in_order_of_computation():
    with torch.device("meta"):
        model = timm.create_model("sdt_v2_15m")
    assert list(model.spike_sources()) == list(load_json("v2/macs_v2")["sdt_v2_15m"]["neurons"])
    assert len(neurons_of(model)) == 77
    thresholds = {path: neuron.v_threshold for path, neuron in neurons_of(model).items()}
    assert {path.endswith("attn_lif") for path, value in thresholds.items() if value == 0.5} == {True}
    assert {value for path, value in thresholds.items() if not path.endswith("attn_lif")} == {1.0}


@pytest.mark.parametrize("side", [1, 7, 31, 40])
def test_any_image_size_works(side):
    hook = {}
    logits, _ = tiny(T=2).eval()(images(side), hook)
    assert logits.shape == (2, 5)
    halved = side
    for _ in range(4):
        halved = -(-halved // 2)
    assert hook["block4.0.attn.head_lif"].shape == (2, 2, 16, halved, halved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dims": 256}, r"embed_dims=256 must be 4 positive numbers: the channels of the four stages"),
        ({"embed_dims": [8, 8, 8]}, r"embed_dims=\[8, 8, 8\] must be 4 positive numbers"),
        ({"embed_dims": [8, 0, 8, 8]}, "must be 4 positive numbers"),
        ({"embed_dims": [1, 8, 8, 8]}, "starts with half of the first, so it is >= 2"),
        ({"depths": 8}, "depths=8 must be 2 positive numbers: the Transformer blocks of stage 3 and of stage 4"),
        ({"num_heads": 3}, r"num_heads=3 must divide the last two of embed_dims=\[4, 8, 12, 16\]"),
        ({"num_heads": 0}, "num_heads=0 must divide"),
        ({"mlp_ratios": 0.1}, "mlp_ratios=0.1 leaves a layer no channel"),
        ({"T": 0}, "T=0 must be at least 1"),
        ({"num_classes": 0, "kd": True}, "kd=True needs classes for its second head"),
        ({"pretrained": True}, "Spike-Driven-Transformer-V2; load one with"),
    ],
)
def test_construction_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_published_command_lines_build_it():
    unused = dict(patch_size=4, sr_ratios=1, drop_rate=0.1, drop_path_rate=0.2, qkv_bias=False)
    model = timm.create_model(
        "sdt_v2", img_size_h=32, img_size_w=48, in_channels=1, mlp_ratios=4, T=2, **TINY, **unused
    )
    assert model(images(channels=1))[0].shape == (2, 5)
    with pytest.warns(UserWarning, match="dvs_mode=True has no effect on this model"):
        tiny(dvs_mode=True)


def test_a_second_head_gives_a_pair_in_training_and_the_mean_in_evaluation():
    model = tiny(kd=True)
    nn.init.normal_(model.head.bias)
    both = model(images())[0]
    assert [logits.shape for logits in both] == [(2, 5)] * 2
    model.eval()
    features = model.forward_features(images())
    spikes = model.lif(features).mean(0)
    expected = (model.head(spikes) + model.head_kd(spikes)) / 2
    torch.testing.assert_close(model(images())[0], expected)
    model.reset_classifier(3)
    assert model(images())[0].shape == (2, 3)
    model.reset_classifier(0)
    assert set(dict(model.named_children())) & {"head_kd"} == set()


def test_event_frames_bring_their_time_steps_and_tet_keeps_them():
    frames = torch.randn(2, 3, 2, 32, 32)  # [B, T, C, H, W]
    model = tiny(in_channels=2, TET=True).eval()
    hook = {}
    assert model(frames, hook)[0].shape == (3, 2, 5)
    assert {len(spikes) for spikes in hook.values()} == {3}


def test_calls_do_not_depend_on_each_other_and_copies_compute_the_same():
    tensors, model = golden_model("t4_h4")
    x = tensors["input"]
    first = model.eval()(x)[0]
    model(x[:1])
    twin = copy.deepcopy(model)
    assert torch.equal(model(x)[0], first)
    assert torch.equal(twin(x)[0], first)


def test_every_neuron_is_made_by_the_factory_with_its_settings():
    model = tiny(spike_mode="plif", neuron_args={"init_tau": 3.0})
    assert {type(neuron).__name__ for neuron in neurons_of(model).values()} == {"ParametricLIF"}
    calls = []

    def counted(**given):
        calls.append(given)
        return make_neuron(**given)

    neurons = neurons_of(tiny(neuron=counted))
    assert len(calls) == len(neurons)
    assert [call for call in calls if call] == [{"v_threshold": 0.5}] * 2


class Doubled(MLP):
    def forward(self, x):
        return 2 * super().forward(x)


@register_model
def own_v2_doubled(**settings) -> MetaSpikeFormer:
    return sdt_v2(mlp_layer=Doubled, **settings)


def test_parts_of_ones_own_are_called_as_documented():
    cfg = config_from({"model": "own_v2_doubled", "embed_dims": [4, 8, 12, 16], "depths": [1, 1], "num_heads": 2,
                       "plugin": "own.py", "num_classes": 10})  # fmt: skip
    model = build_model(cfg)
    assert {type(block.mlp) for block in [*model.block3, *model.block4]} == {Doubled}
    x = torch.randn(1, 2, 12, 2, 2)
    block = model.block3[0].eval()
    y = x + block.attn(x)
    torch.testing.assert_close(block(x), y + 2 * MLP.forward(block.mlp, y))


def test_each_part_is_called_as_documented():
    calls = []

    def recorded(kind):
        def build(*args, **kwargs):
            calls.append((kind.__name__, args, set(kwargs)))
            return kind(*args, **kwargs)

        return build

    layers = dict(downsample_layer=DownSampling, conv_layer=ConvBlock, block_layer=TransformerBlock,
                  attn_layer=Attention, mlp_layer=MLP)  # fmt: skip
    tiny(**{name: recorded(kind) for name, kind in layers.items()}, mlp_ratios=3)
    neuron, down = {"neuron"}, {"neuron", "kernel_size", "stride", "first"}
    assert calls[0] == ("DownSampling", (3, 2), down)
    assert ("ConvBlock", (2, 3), neuron) in calls
    assert ("TransformerBlock", (12, 2, 3), {"neuron", "attn_layer", "mlp_layer"}) in calls
    assert ("Attention", (12, 2), neuron) in calls
    assert ("MLP", (12, 36), neuron) in calls


@pytest.mark.parametrize("convert", ["sync", "split"])
def test_batchnorm_variants_fit_every_layer(convert):
    model = tiny(T=2)
    if convert == "sync":
        model = convert_sync_batchnorm(model, torch.device("cpu"))
    else:
        model = convert_split_batchnorm(model, 2, 2)
    left = [type(m).__name__ for m in model.modules() if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d)]
    assert left == ([] if convert == "sync" else ["BatchNorm2d"] * len(left))
    x = images(batch=4)
    assert torch.isfinite(model(x)[0]).all()
    assert torch.isfinite(model.eval()(x)[0]).all()


def test_settings_reach_the_model_and_come_back_from_it():
    cfg = config_from({"model": "sdt_v2", "embed_dims": [4, 8, 12, 16], "depths": [1, 2], "num_heads": 4,
                       "time_steps": 3, "spike_mode": "plif", "bn_eps": 1e-3, "num_classes": 10})  # fmt: skip
    model = build_model(cfg)
    assert (model.embed_dims, model.depths, model.num_heads, model.T) == ([4, 8, 12, 16], [1, 2], 4, 3)
    assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {1e-3}
    assert sizes_in_words(cfg, model) == "1 + 2 blocks, D = 4, 8, 12, 16, plif neurons, "
    with torch.device("meta"):
        named = build_model(config_from({"model": "sdt_v2_15m", "num_classes": 10}))
    complete = with_sizes_of(config_from({"model": "sdt_v2_15m", "num_classes": 10}), named)
    assert (complete.embed_dims, complete.depths, complete.num_heads) == ([64, 128, 256, 360], [6, 2], 8)
    assert config_from(complete.as_dict()).warnings == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "sdt_v2", "dim": 512}, "dim 512 does not fit sdt_v2, a V2 model; use embed_dims with 4 values"),
        ({"model": "sdt_v2", "layer": 6}, "layer 6 does not fit sdt_v2, a V2 model; use depths with 2 values"),
        ({"model": "sdt_v2", "embed_dims": [8, 8, 12, 20], "num_heads": 8}, "num_heads 8 does not divide 12 or 20 of"),
        ({"model": "sdt_v2", "embed_dims": [1, 8, 8, 8]}, "starts with 1"),
        ({"embed_dims": [8, 8, 8, 8]}, "is for V2, and model is sdt; use dim"),
        ({"depths": [1, 1]}, "is for V2, and model is sdt; use layer"),
    ],
)
def test_sizes_of_the_other_version_are_refused_with_the_setting_to_use(settings, message):
    with pytest.raises(UserError, match=message):
        config_from(settings)


def test_what_v2_does_not_use_warns_and_odd_sizes_are_no_problem():
    (warning,) = config_from({"model": "sdt_v2_15m", "pooling_stat": "0011", "img_size": 225}).warnings
    assert "pooling_stat 0011 has no effect on sdt_v2_15m, a V2 model" in warning
