"""The model as users build and call it: registry, arguments, errors, shapes, recorded spikes.

That it computes what the published one does is `test_golden_model.py`'s subject.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from tiny import TINY, lively, tiny

from model import sdt
from module import MS_SPS, MS_Block_Conv, MS_MLP_Conv, MS_SSA_Conv
from module.neuron import make_neuron
from utils.run.checkpoint import load_weights

VARIANTS = {
    # name: (depths, D, image side, classes, pooling, parameters)
    "sdt": (8, 512, 224, 1000, "1111", 29_689_896),
    "sdt_8_384": (8, 384, 224, 1000, "1111", 16_816_536),
    "sdt_6_512": (6, 512, 224, 1000, "1111", 23_373_736),
    "sdt_8_512": (8, 512, 224, 1000, "1111", 29_689_896),
    "sdt_10_512": (10, 512, 224, 1000, "1111", 36_006_056),
    "sdt_8_768": (8, 768, 224, 1000, "1111", 66_339_144),
    "sdt_2_256": (2, 256, 32, 10, "0011", None),
    "sdt_2_512": (2, 512, 32, 10, "0011", 10_233_546),
}


def images(batch=3, channels=3, side=16):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(batch))


def test_the_registry_lists_the_documented_models():
    of_v2 = {"sdt_v2", "sdt_v2_15m", "sdt_v2_31m", "sdt_v2_55m", "sdt_v2_124m"}
    assert set(timm.list_models("sdt*")) == set(VARIANTS) | of_v2
    assert set(timm.list_models("metaspikformer*")) == {f"metaspikformer_8_{dim}" for dim in (384, 512, 768)}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_has_its_sizes(name):
    depths, dim, side, classes, pooling, parameters = VARIANTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert (model.depths, model.embed_dims, model.num_classes, model.pooling_stat) == (depths, dim, classes, pooling)
    assert (model.T, model.num_heads, model.mlp_ratios) == (4, 8, 4)
    assert len(model.block) == depths
    model._check_size(side, side)
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "spike_mode"), [*((name, "lif") for name in VARIANTS), ("sdt", "plif")])
def test_each_variant_trains_at_a_small_size(name, spike_mode):
    torch.manual_seed(0)
    model = lively(timm.create_model(name, **TINY, spike_mode=spike_mode))
    logits, hook = model(images())
    assert logits.shape == (3, 5)
    assert hook is None
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name
    without = {parameter_name for parameter_name, p in model.named_parameters() if not p.requires_grad}
    unused = ["attn.talking_heads.weight"] + (["attn.attn_lif.w"] if spike_mode == "plif" else [])
    rpe = {"patch_embed.rpe_lif.w"} if spike_mode == "plif" else set()
    assert without == {f"block.0.{parameter}" for parameter in unused} | rpe
    assert torch.isfinite(logits).all()


def test_sdt_without_arguments_is_8_512():
    with torch.device("meta"):
        assert sum(p.numel() for p in sdt().parameters()) == VARIANTS["sdt_8_512"][-1]


def test_first_weights_are_those_of_the_published_model():
    torch.manual_seed(0)
    for name, module in tiny(embed_dims=64).named_modules():
        if isinstance(module, torch.nn.Conv2d):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert abs(float(module.weight.detach().mean())) < 0.003, name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert bool((module.weight == 1).all()), name
            assert not module.bias.any(), name


def test_every_argument_that_training_scripts_pass_is_accepted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = timm.create_model(
            "sdt",
            pretrained=False,
            T=2,
            img_size_h=16,
            img_size_w=32,
            patch_size=4,
            in_channels=2,
            num_classes=7,
            embed_dims=32,
            num_heads=8,
            mlp_ratios=4,
            depths=2,
            sr_ratios=1,
            qkv_bias=False,
            pooling_stat="0011",
            spike_mode="plif",
            dvs_mode=True,
            TET=True,
            drop_rate=0.1,
            drop_path_rate=0.2,
            drop_block_rate=None,
        )
    assert model(torch.randn(1, 2, 16, 32))[0].shape == (2, 1, 7)


@pytest.mark.parametrize("argument", [{"qkv_bias": True}, {"sr_ratios": 2}])
def test_arguments_that_would_be_ignored_warn(argument):
    with pytest.warns(UserWarning, match="has no effect on this model"):
        tiny(**argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spike_mode": "lief"}, r"spike_mode='lief' is not one of lif, plif, .* \(did you mean lif\?\)"),
        ({"spike_mode": "liaf"}, "spike_mode='liaf' is not one of .*needs a function"),
        ({"neuron_args": {"taus": 3.0}}, "neuron_args: lif has no argument taus; it has tau"),
        ({"neuron_args": {"tau": 0.5}}, "do not fit lif"),
        ({"neuron_dtype": "half"}, "neuron_dtype='half' is not one of float32, input"),
        ({"pooling_stat": "011"}, "pooling_stat='011' must be four characters, each '0'.* or '1'"),
        ({"pooling_stat": "0021"}, "pooling_stat='0021' must be four characters, each '0'.* or '1'"),
        ({"embed_dims": 24, "num_heads": 5}, "embed_dims=24 must be divisible by num_heads=5"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"embed_dims": 20}, "embed_dims=20 must be a positive multiple of 8"),
        ({"embed_dims": 0}, "embed_dims=0 must be a positive multiple of 8"),
        ({"mlp_ratios": 0.01}, "mlp_ratio=0.01 leaves the MLP no channel at embed_dims=16"),
        ({"img_size_h": 18}, "image height 18 must be a positive multiple of 4: pooling_stat='0011' halves it 2"),
        ({"img_size_w": 0}, "image width 0 must be a positive multiple of 4"),
        ({"T": 0}, "T=0 must be at least 1"),
        ({"depths": 0}, "depths=0 must be at least 1"),
        ({"in_channels": 0}, "in_channels=0 must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 0"),
        ({"pretrained": True}, "no weights come with this project.*--resume FILE"),
    ],
)
def test_construction_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"shape \(3, 16, 16\) has 3 dimensions; expected images \[B, C, H, W\] or event frames"),
        ((1, 1, 1, 3, 16, 16), "has 6 dimensions"),
        ((1, 4, 16, 16), "has 4 channels, the model in_channels=3"),
        ((1, 2, 4, 16, 16), "has 4 channels, the model in_channels=3"),
        ((1, 3, 16, 18), "image width 18 must be a positive multiple of 4"),
    ],
)
def test_forward_refuses_inputs_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))


def test_time_steps_of_event_frames_are_taken_or_refused_as_the_setting_says():
    frames = torch.randn(2, 3, 3, 16, 16)  # T = 3, the models say 2
    assert tiny(TET=True)(frames)[0].shape == (3, 2, 5)
    with pytest.raises(ValueError, match=r"has 3 time steps, the model T=2; .*data_T=True"):
        tiny(data_T=False)(frames)
    assert tiny(TET=True, data_T=False)(frames[:, :2])[0].shape == (2, 2, 5)


def test_a_static_image_is_the_same_as_its_repetition_in_time():
    torch.manual_seed(0)
    model = lively(tiny()).double().eval()
    x = images().double()
    repeated = x.unsqueeze(1).repeat(1, 2, 1, 1, 1)  # [B, T, C, H, W]
    torch.testing.assert_close(model(repeated)[0], model(x)[0], rtol=0, atol=0)


def test_tet_keeps_the_steps_whose_mean_are_the_logits_otherwise():
    torch.manual_seed(0)
    per_step = lively(tiny(TET=True)).double().eval()
    mean = tiny().double().eval()
    mean.load_state_dict(per_step.state_dict())
    logits = per_step(images().double())[0]
    assert logits.shape == (2, 3, 5)
    torch.testing.assert_close(mean(images().double())[0], logits.mean(0), rtol=1e-12, atol=1e-12)


def test_without_classes_the_output_is_the_head_neurons_rate():
    model = lively(tiny(num_classes=0)).eval()
    output, hook = model(images(), hook={})
    assert "head.weight" not in model.state_dict()
    torch.testing.assert_close(output, hook["head_lif"].mean(0))


@pytest.mark.parametrize("dvs_mode", [False, True])
def test_logits_of_an_image_do_not_depend_on_its_batch(dvs_mode):
    torch.manual_seed(0)
    model = lively(tiny(dvs_mode=dvs_mode)).double().eval()
    x = images(5).double()
    together = model(x)[0]
    # Convolutions of another batch size may add in another order: 1e-9 is far below the step of one spike (0.5 / N).
    for i in range(5):
        torch.testing.assert_close(model(x[i : i + 1])[0], together[i : i + 1], rtol=0, atol=1e-9)
    assert together.std(0).max() > 1e-3


def test_copying_and_resetting_after_training_change_nothing():
    torch.manual_seed(0)
    model = lively(tiny())
    model(images(2))[0].sum().backward()
    twin = copy.deepcopy(model).eval()
    functional.reset_net(model)
    torch.testing.assert_close(model.eval()(images(4))[0], twin(images(4))[0], rtol=0, atol=0)


SPS_SHAPES = {"MS_SPS_lif": (2, 3, 2, 16, 16), "MS_SPS_lif3": (2, 3, 16, 4, 4)}
BLOCK_SHAPES = {
    "MS_SSA_Conv0_first_lif": (2, 3, 16, 4, 4),
    "MS_SSA_Conv0_q_lif": (2, 3, 16, 4, 4),
    "MS_SSA_Conv0_k_lif": (2, 3, 16, 4, 4),
    "MS_SSA_Conv0_v_lif": (2, 3, 16, 4, 4),
    "MS_SSA_Conv0_kv_before": (2, 3, 4, 16, 4),
    "MS_SSA_Conv0_kv": (2, 3, 4, 1, 4),
    "MS_SSA_Conv0_x_after_qkv": (2, 3, 16, 4, 4),
    "MS_MLP_Conv0_fc1_lif": (2, 3, 16, 4, 4),
    "MS_MLP_Conv0_fc2_lif": (2, 3, 32, 4, 4),
}


def test_hook_is_filled_with_detached_spikes_under_the_published_names():
    model = lively(tiny(depths=2))
    hook: dict[str, torch.Tensor] = {}
    _, returned = model(images(), hook=hook)
    assert returned is hook
    blocks = [name.replace("Conv0", f"Conv{i}") for i in range(2) for name in BLOCK_SHAPES]
    assert list(hook) == ["MS_SPS_lif", "MS_SPS_lif1", "MS_SPS_lif2", "MS_SPS_lif3", *blocks, "head_lif"]
    for name, shape in (SPS_SHAPES | BLOCK_SHAPES | {"head_lif": (2, 3, 16)}).items():
        assert tuple(hook[name].shape) == shape, name
    for name, spikes in hook.items():
        assert not spikes.requires_grad, name
        assert set(spikes.unique().tolist()) <= {0.0, 1.0}, name
    assert sum(spikes.sum() for spikes in hook.values()) > 0


def test_no_hook_stays_behind_even_when_a_forward_fails():
    model = tiny()
    model(images(), hook={})
    with pytest.raises(ValueError, match="channels"):
        model(images(channels=1), hook={})
    assert not any(module._forward_hooks for module in model.modules())


def test_event_mode_pools_keys_values_their_product_and_the_masked_queries():
    torch.manual_seed(0)
    plain, pooled = lively(MS_SSA_Conv(16, 4).double()).eval(), MS_SSA_Conv(16, 4, dvs_mode=True).double().eval()
    pooled.load_state_dict(plain.state_dict())
    seen: dict[str, torch.Tensor] = {}
    for name, module in (plain.spike_sources("p") | pooled.spike_sources("e")).items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    x = 3 * torch.randn(2, 3, 16, 4, 6, dtype=torch.float64)
    plain(x)
    output = pooled(x)

    def pool(spikes):  # 3 x 3 over the last two dimensions, written as a maximum over shifts
        padded = F.pad(spikes, (1, 1, 1, 1))
        height, width = spikes.shape[-2:]
        windows = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return torch.stack(windows).amax(0)

    def heads(spikes):  # [T, B, D, H, W] -> [T, B, h, N, D/h]
        return spikes.flatten(3).reshape(2, 3, 4, 4, 24).transpose(3, 4)

    k, v = pool(seen["p_k_lif"]), pool(seen["p_v_lif"])
    torch.testing.assert_close(seen["e_k_lif"], k)
    torch.testing.assert_close(seen["e_v_lif"], v)
    torch.testing.assert_close(seen["e_kv_before"], heads(k) * heads(v))
    mask = make_neuron("lif", v_threshold=0.5)(pool(heads(k) * heads(v)).sum(3, keepdim=True))
    torch.testing.assert_close(seen["e_kv"], mask)
    masked = pool(heads(seen["p_q_lif"]) * mask).transpose(3, 4).reshape(2, 3, 16, 4, 6)
    torch.testing.assert_close(seen["e_x_after_qkv"], masked)
    assert output.shape == x.shape
    assert 0 < masked.mean() < 1


@pytest.mark.parametrize("mlp_ratio", [1, 2])
def test_mlp_follows_the_formula_with_a_shortcut_of_its_own_at_equal_widths(mlp_ratio):
    torch.manual_seed(0)
    mlp = lively(MS_MLP_Conv(8, 8 * mlp_ratio)).double().eval()
    x = torch.randn(3, 2, 8, 4, 4, dtype=torch.float64)

    def layer(spikes, conv, bn):  # a 1x1 convolution is a product over channels; fresh statistics: mean 0, variance 1
        y = torch.einsum("oc,tbchw->tbohw", conv.weight[:, :, 0, 0], spikes)
        y = (y + conv.bias.view(-1, 1, 1)) / (1 + bn.eps) ** 0.5
        return y * bn.weight.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)

    fire = make_neuron("lif")
    a = layer(fire(x), mlp.fc1_conv, mlp.fc1_bn)
    shortcut = x
    if mlp_ratio == 1:
        a = shortcut = a + x
    expected = layer(fire(a), mlp.fc2_conv, mlp.fc2_bn) + shortcut
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)


def test_parts_are_importable_and_keep_the_shape_of_membrane_values():
    x = MS_SPS(in_channels=2, embed_dims=16, pooling_stat="0101")(torch.randn(2, 1, 2, 8, 8))
    assert x.shape == (2, 1, 16, 2, 2)
    assert MS_Block_Conv(dim=16, num_heads=2, mlp_ratio=1.5)(x).shape == x.shape


def test_a_checkpoint_in_the_published_form_loads(tmp_path):
    torch.manual_seed(0)
    model = lively(tiny()).double().eval()
    prefixed = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": prefixed, "epoch": 309, "version": 2, "metric": 95.6}, tmp_path / "published.pth.tar")
    torch.manual_seed(1)
    other = tiny().double().eval()
    assert not torch.equal(other(images().double())[0], model(images().double())[0])
    load_weights(other, tmp_path / "published.pth.tar")
    torch.testing.assert_close(other(images().double())[0], model(images().double())[0], rtol=0, atol=0)
