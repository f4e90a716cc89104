"""The sparse engine in the model: numerics of the published network, fallbacks, settings."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from golden import FORWARD_FILES, load_tensors, model_arguments, relative_error, under

from model import SpikeDrivenTransformer, sdt
from module.accelerate import accelerate, for_evaluation
from module.sparse.conv import SparseConv2d
from module.sparse.inference import SparseInference, why_not
from utils.measure.synapses import SynapseRecorder

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler: the engine falls back to dense layers"
)

# float32 sums in another order, against float64.
TOLERANCE = 1e-5
SMALL = dict(img_size_h=16, img_size_w=16, num_classes=5, embed_dims=40, num_heads=4, depths=1, pooling_stat="0011")


def golden_model(name: str, engine: str = "dense") -> tuple[dict[str, torch.Tensor], SpikeDrivenTransformer]:
    meta, tensors = load_tensors(name)
    model = sdt(**model_arguments(meta["cfg"]))
    model.load_state_dict(under(tensors, "state"), strict=True)
    return tensors, accelerate(model.eval(), engine=engine, prove=False)


def small_model(*, engine: str = "dense", **options: object) -> SpikeDrivenTransformer:
    """Random weights, and statistics of BatchNorm that make its neurons fire; the same ones for each engine.

    Weights and means are small multiples of 1/32, variances powers of 4: float32 sums of spikes have no rounding,
    in whatever order, and nor have the potentials. With other weights one may fall within rounding of its threshold
    and fire in one engine only, on one machine only.
    """
    torch.manual_seed(0)
    model = sdt(**(SMALL | options)).train()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum, norm.eps = None, 2.0**-17  # the average of all batches, here of one; 1e-5 is no power of 2
        torch.nn.init.constant_(norm.bias, 0.5)  # so that enough of them fire, the mask of the attention too
    with torch.no_grad():
        for conv in (module for module in model.modules() if isinstance(module, torch.nn.Conv2d)):
            for parameter in conv.parameters():
                parameter.copy_(torch.randint(-8, 9, parameter.shape) / 32)
        model(images(model))
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_((norm.running_mean * 32).round() / 32)
            power = norm.running_var.clamp_min(1 / 16).log2().div(2).round()
            norm.running_var.copy_(4**power - norm.eps)
    return accelerate(model.eval(), engine=engine)


def images(model: SpikeDrivenTransformer, batch: int = 3) -> torch.Tensor:
    """Multiples of 1/4: see `small_model`."""
    x = torch.randn(batch, model.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    return (x * 4).round() / 4


@pytest.mark.parametrize("name", FORWARD_FILES)
def test_layers_give_the_golden_logits_and_firing_rates(name):
    tensors, model = golden_model(name, engine="sparse")
    assert any(isinstance(layer, SparseConv2d) for layer in model.modules())
    with torch.no_grad():
        logits, hook = model(tensors["input"].float(), {})
    assert relative_error(logits, tensors["eval/logits"]) < TOLERANCE
    for layer in model.modules():
        if isinstance(layer, SparseConv2d):
            assert layer.counts is not None
            assert layer.counts[0] >= 0, "spikes only"
    for key, rate in under(tensors, "eval/rate").items():
        elements = hook[key][0].numel()
        flips = (hook[key].double().mean(tuple(range(1, hook[key].dim()))) - rate).abs().max() * elements
        # A potential within float32 rounding of the threshold may fall on its other side; the plain float32
        # network flips such spikes too. None but these: one per tensor and step.
        assert flips < 1.5, key


@pytest.mark.parametrize("name", FORWARD_FILES)
def test_inference_on_bits_gives_the_golden_logits(name):
    tensors, model = golden_model(name)
    if name == "dvs_tet":
        assert "event mode" in str(why_not(model))
        return
    inference = SparseInference(model)
    logits, _ = inference(tensors["input"].float())
    assert relative_error(logits, tensors["eval/logits"]) < TOLERANCE
    # The same additions as the layers do, which count them one by one.
    layered = accelerate(copy.deepcopy(model), engine="sparse", prove=False)
    layered(tensors["input"].float(), {})  # watched, so that q, k and v are not joined into one layer
    counted = {n: int(m.counts[1]) for n, m in layered.named_modules() if isinstance(m, SparseConv2d)}
    done = inference.additions()
    assert {n: done[n] for n in counted} == counted


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(pooling_stat="0000"),
        dict(pooling_stat="1100"),
        dict(spike_mode="plif"),
        dict(neuron_args={"tau": 4.0}),
        dict(mlp_ratios=1),
        dict(T=1),
        dict(T=7, TET=True),
        dict(embed_dims=8, num_heads=1, in_channels=1),
        dict(embed_dims=136, num_heads=8, num_classes=0),
    ],
    ids=str,
)
def test_inference_on_bits_equals_the_model(options):
    model = small_model(**options)
    x = images(model)
    with torch.no_grad():
        expected, _ = model(x)
    logits, _ = SparseInference(model)(x)
    assert relative_error(logits, expected.double()) < TOLERANCE


def test_inference_on_event_frames_equals_the_model():
    model = small_model(in_channels=2, T=4)
    x = torch.randint(0, 3, (2, 5, 2, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        expected, _ = model(x)
    assert relative_error(SparseInference(model)(x)[0], expected.double()) < TOLERANCE


def test_inference_does_not_depend_on_the_number_of_threads():
    inference = SparseInference(small_model())
    x = torch.randn(5, 3, 16, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = inference(x)
        torch.set_num_threads(2)
        two, _ = inference(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_inference_keeps_its_weights_and_fills_a_hook_through_the_model():
    model = small_model()
    inference, x = SparseInference(model), images(model)
    before, _ = inference(x)
    with torch.no_grad():
        model.block[0].mlp.fc1_conv.weight.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(inference(x)[0], before)
    _, hook = inference(x, {})
    assert set(hook) == set(model.spike_sources())


def test_training_step_has_the_gradients_of_the_plain_one():
    plain, sparse = small_model().train(), small_model(engine="sparse").train()
    x = images(plain)
    logits = [model(x)[0] for model in (plain, sparse)]
    assert torch.equal(*logits), "no sum was rounded, so that no spike may differ"
    for out in logits:
        out.square().sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, sparse)]
    assert set(gradients[0]) == set(gradients[1])
    scale = max(float(g.abs().max()) for g in gradients[0].values())
    for name, expected in gradients[0].items():
        difference = float((gradients[1][name] - expected).abs().max())
        # A bias before a BatchNorm has no effect: its gradient is rounding alone, and is judged by the network's
        # largest one.
        size = scale if name.endswith("conv.bias") else float(expected.abs().max())
        assert difference < TOLERANCE * size, name


def test_additions_of_layers_are_those_of_the_last_call_and_of_the_inference_all():
    model = small_model(engine="sparse")
    x = images(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseConv2d)}

    def counted(batch):
        with torch.no_grad():
            model(batch, {})  # watched, so that q, k and v are not joined into one layer
        return {n: int(m.counts[1]) for n, m in layers.items() if m.counts is not None}

    whole, part = counted(x), counted(x[:1])
    assert whole.keys() == part.keys()
    assert all(0 < part[name] < whole[name] for name in whole)
    inference = SparseInference(model)
    for batch in (x, x[:1]):
        inference(batch)
    assert {name: count for name, count in inference.additions().items() if name in whole} == {
        name: whole[name] + part[name] for name in whole
    }


@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_of_spikes_are_bfloat16_where_that_is_asked_for(bf16):
    torch.manual_seed(0)
    x, g = (torch.rand(3, 40, 6, 6) < 0.3).float().requires_grad_(), torch.randn(3, 33, 6, 6)
    conv = torch.nn.Conv2d(40, 33, 1)
    layer = accelerate(copy.deepcopy(conv), engine="sparse", bf16_input_grad=bf16)
    assert isinstance(layer, SparseConv2d)
    (gradient,) = torch.autograd.grad(layer(x), x, g)
    (exact,) = torch.autograd.grad(conv(x), x, g)
    difference = relative_error(gradient, exact.double())
    assert 2**-12 < difference < 2**-6 if bf16 else difference < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_gives_the_dtype_of_autocast_whatever_its_spikes_are_stored_as(dtype):
    layer = accelerate(torch.nn.Conv2d(8, 4, 1), engine="sparse", amp_dtype=torch.bfloat16)
    assert isinstance(layer, SparseConv2d)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer((torch.rand(2, 8, 3, 3) < 0.5).to(dtype)).dtype == torch.bfloat16


def test_training_under_autocast_computes_in_bfloat16():
    model = small_model(engine="sparse").train()
    dtypes = set()
    for layer in model.modules():
        if isinstance(layer, SparseConv2d):
            layer.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = model(images(model))
    assert dtypes == {torch.bfloat16}
    logits.float().sum().backward()
    gradient = model.block[0].attn.q_conv.weight.grad  # type: ignore[union-attr]
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert bool(torch.isfinite(gradient).all())


def test_float64_stays_dense_and_exact():
    model = small_model(engine="sparse").double()
    assert SparseConv2d in map(type, model.modules())
    plain = small_model().double()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images(model).double())[0], plain(images(plain).double())[0])


def test_the_model_can_be_copied_and_a_copy_evaluated():
    model = copy.deepcopy(small_model(engine="sparse"))
    inference = for_evaluation(model)
    assert isinstance(inference, SparseInference)
    with torch.no_grad():
        expected, _ = model(images(model))
    assert relative_error(inference(images(model))[0], expected.double()) < TOLERANCE


def test_only_convolutions_the_kernels_know_are_replaced():
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 1),
        torch.nn.Conv2d(4, 4, 3, padding=1),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Conv2d(4, 4, 3, padding=1, stride=2),
        torch.nn.Conv2d(4, 4, 3, padding=1, groups=2),
        torch.nn.Conv2d(4, 4, 3, padding="same"),
        torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    )
    accelerate(layers, engine="sparse")
    assert [type(layer) is SparseConv2d for layer in layers] == [True, True, *[False] * 5]


@pytest.mark.parametrize("engine", ["", "events"])
def test_an_unknown_engine_is_an_error(engine):
    with pytest.raises(ValueError, match="auto, dense, sparse"):
        accelerate(torch.nn.Conv2d(1, 1, 1), engine=engine)


def test_the_old_name_of_the_engine_is_accepted():
    layer = accelerate(torch.nn.Conv2d(4, 4, 1), engine="event")
    assert type(layer) is SparseConv2d
    assert not layer.auto


def test_the_energy_report_counts_the_additions_that_the_engine_does():
    """The report's `exact` operations of each layer, and what the kernels say that they added."""
    model = small_model(engine="sparse").eval()
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad(), SynapseRecorder(model) as recorder:
        model(x)
    reported = {layer.name: sum(layer.synops or []) for layer in recorder.counts().layers}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseConv2d)}
    done = {name: int(layer.counts[1]) for name, layer in layers.items() if layer.counts is not None}
    assert len(done) >= 9
    assert sum(done.values()) > 0
    assert done == {name: reported[name] for name in done}


def test_neurons_of_other_kinds_are_not_computed_on_bits():
    model = small_model()
    assert why_not(model) is None
    model.block[0].attn.q_lif.v_reset = None  # type: ignore[union-attr] -- a soft reset
    assert "block.0.attn.q_lif is not a neuron with hard reset to 0" in str(why_not(model))
    assert "float32 on a CPU is needed" in str(why_not(small_model().double()))
