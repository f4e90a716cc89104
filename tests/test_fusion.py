"""What is computed together equals what is computed apart: fused layers, folding, checkpointing, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from golden import FORWARD_FILES, load_tensors, model_arguments, relative_error, under
from timm.optim import create_optimizer_v2
from tiny import neuron_on
from torch import Tensor, nn

from benchmarks.plain import PlainSDT
from model import SpikeDrivenTransformer, sdt, sdt_arguments
from module.accelerate import accelerate, detach, rows
from module.kernels import attention as attention_ops
from module.kernels import batchnorm as norm_ops
from module.kernels import cpu as cpu_kernels
from module.kernels import fusion
from module.mlp import MS_MLP_Conv
from module.neuron import make_neuron

SMALL = dict(img_size_h=16, img_size_w=16, num_classes=5, embed_dims=16, num_heads=4, depths=2, pooling_stat="0011")
# In float64 only the order of summation differs.
TOLERANCE = 1e-9

needs_kernels = pytest.mark.skipif(cpu_kernels.why_unusable() is not None, reason=str(cpu_kernels.why_unusable()))


def build(kind: type[SpikeDrivenTransformer] | None = None, **changes) -> SpikeDrivenTransformer:
    """A model with weights large enough for all layers to fire; accelerated unless its class is given."""
    torch.manual_seed(0)
    model = (kind or SpikeDrivenTransformer)(**sdt_arguments(**SMALL | changes)).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.6)
                module.bias.uniform_(-0.1, 0.5)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=2.0 / (module.weight[0].numel() ** 0.5))
                if module.bias is not None:
                    module.bias.uniform_(-0.3, 0.3)
    return model if kind else accelerated(model)


def accelerated(model: SpikeDrivenTransformer) -> SpikeDrivenTransformer:
    """With every part computed together: one whose proof failed would be equal to the plain one in any case."""
    accelerate(model)
    if cpu_kernels.why_unusable() is None:
        assert [row for row in rows(model) if row.runs_as == "plain"] == []
    return model


def images(model: SpikeDrivenTransformer, size: int = 16) -> Tensor:
    return torch.randn(
        3, model.in_channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def training_step(model: SpikeDrivenTransformer, x: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and buffers by name."""
    model.train().zero_grad()
    x = x.clone().requires_grad_(x.dim() == 5)
    logits, _ = model(x)
    F.cross_entropy(logits, torch.arange(len(x))).backward()
    found = {"logits": logits.detach()} | ({"input": x.grad} if x.grad is not None else {})
    # Biases before BatchNorm have gradient 0, which rounding fills with noise.
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.endswith("_conv.bias")}
    return found | dict(model.named_buffers())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value.double()) < TOLERANCE, name


@pytest.mark.parametrize(
    "change", [{}, {"spike_mode": "plif"}, {"dvs_mode": True}, {"mlp_ratios": 1}, {"T": 1}], ids=str
)
def test_training_step_equals_the_plain_baseline(change):
    published, plain, model = build(PlainSDT, **change), build(SpikeDrivenTransformer, **change), build(**change)
    x = images(model)
    expected, actual = training_step(published, x), training_step(model, x)
    assert_same(training_step(plain, x), expected)
    assert float(expected["block.1.mlp.fc2_conv.weight"].abs().max()) > 0  # gradients reach every layer's spikes
    assert_same(actual, expected)


def test_event_frames_equal_the_plain_baseline():
    plain, model = build(PlainSDT, in_channels=2), build(in_channels=2)
    x = torch.randn(3, 5, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_same(training_step(model, x), training_step(plain, x))


@pytest.mark.parametrize("change", [{}, {"spike_mode": "plif"}, {"dvs_mode": True}, {"pooling_stat": "1110"}], ids=str)
def test_evaluation_folded_or_not_equals_the_plain_baseline(change):
    plain, model = build(PlainSDT, **change).eval(), build(**change).eval()
    x = images(model)
    with torch.no_grad():
        expected = plain(x)[0]
        assert relative_error(model(x)[0], expected) < TOLERANCE
        assert relative_error(model.fuse()(x)[0], expected) < TOLERANCE
    # With gradients wanted (a saliency map, say) evaluation runs too, and has them.
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(build(**change).eval()(x)[0].sum(), x)
    (expected_gradient,) = torch.autograd.grad(build(SpikeDrivenTransformer, **change).eval()(x)[0].sum(), x)
    assert relative_error(gradient, expected_gradient) < TOLERANCE


@pytest.mark.parametrize("name", FORWARD_FILES)
def test_folded_model_has_the_golden_logits(name):
    meta, tensors = load_tensors(name)
    model = sdt(**model_arguments(meta["cfg"])).double()
    model.load_state_dict(under(tensors, "state"), strict=True)
    with torch.no_grad():
        logits, _ = accelerate(model.eval().fuse())(tensors["input"])
    assert relative_error(logits, tensors["eval/logits"]) < TOLERANCE
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_folding_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval"):
        build().train().fuse()


WATCHED = (
    *("proj_conv", "proj_bn", "proj_lif", "proj_bn3", "rpe_bn", "talking_heads_lif", "kv_before"),
    *("v_conv", "v_bn", "v_lif", "fc1_bn", "fc2_lif"),
)


@needs_kernels
def test_a_watched_module_is_executed_by_itself():
    model = build(depths=1).eval()
    x = images(model)
    with torch.no_grad():
        unwatched = model(x)[0]
        for name, module in model.named_modules():
            if name.endswith(WATCHED):
                seen: list[Tensor] = []
                handle = module.register_forward_hook(lambda m, args, output, seen=seen: seen.append(args[0]))
                assert relative_error(model(x)[0], unwatched) < TOLERANCE, name
                handle.remove()
                assert len(seen) == 1, name
                if name == "patch_embed.proj_conv":
                    assert len(seen[0]) == model.T * len(x)  # per step, as energy is counted


@needs_kernels
def test_a_static_image_is_convolved_once():
    model = build().train()
    calls: list[tuple[int, ...]] = []

    class Watching(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(tuple(x.shape))
            return super().forward(x)

    model.patch_embed.proj_conv.__class__ = Watching
    model(images(model))
    assert calls == [(3, 3, 16, 16)]


@needs_kernels
def test_each_step_of_a_stretched_input_gets_its_own_gradient():
    """Of an image, and of a neuron's current: one leaf, shown as T steps that lie at one place in memory."""
    model = build().train()
    plain = copy.deepcopy(model)
    detach(plain)
    for name in ("patch_embed", "block.0.mlp.fc1_lif"):
        x = images(model).unsqueeze(0).expand(3, -1, -1, -1, -1)
        gradients = []
        for part in (model.get_submodule(name), plain.get_submodule(name)):
            leaf = x.detach().requires_grad_()
            y = part(leaf)
            (y * torch.arange(1, 4, dtype=y.dtype).view(3, 1, 1, 1, 1)).sum().backward()
            gradients.append(leaf.grad)
        assert relative_error(*gradients) < TOLERANCE, name
        assert all(step.abs().max() > 0 for step in gradients[0]), name


def test_checkpointing_changes_no_number_and_keeps_less():
    def kept(model: SpikeDrivenTransformer) -> int:
        count = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(images(model))
        return count

    for change in ({}, {"spike_mode": "plif"}):
        expected = training_step(build(**change), images(build()))
        model = build(**change)
        model.set_grad_checkpointing()
        assert_same(training_step(model, images(model)), expected)
        assert kept(model) < 0.75 * kept(build(**change))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_norm_and_neuron_fire_as_apart_in_low_precision(dtype):
    torch.manual_seed(5)
    norm, neuron = nn.BatchNorm2d(24), make_neuron()
    x = (3 * torch.randn(4, 2, 24, 6, 6)).to(dtype)
    assert not fusion.can_fuse_neurons(x, neuron)
    apart = fusion.norm_neuron(norm, neuron, x)
    ours = nn.BatchNorm2d(24)
    together = fusion.norm_neuron(ours, neuron_on("cpp"), x)
    assert together.dtype == dtype
    # Apart, the normalised value is rounded to the dtype before it charges the neuron: it may fire at another step
    # where it comes within that rounding of the threshold.
    assert float((apart != together).float().mean()) < (1e-3 if dtype == torch.float32 else 2e-2)
    assert torch.allclose(norm.running_mean, ours.running_mean, atol=1e-5)
    assert torch.allclose(norm.running_var, ours.running_var, rtol=1e-4)


@needs_kernels
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the checks themselves
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operator_checks_of_torch_pass(layout):
    x = torch.randn(6, 4, 3, 5).contiguous(memory_format=layout).unflatten(0, (3, 2)).detach().requires_grad_()
    weight, bias = torch.rand(4).requires_grad_(), torch.rand(4).requires_grad_()
    decay = torch.tensor(0.5, requires_grad=True)
    torch.library.opcheck(norm_ops.bn_lif, (x, weight, bias, decay, 3, 1e-5, 1.0, 4.0))
    torch.library.opcheck(norm_ops.bn_add, (x, weight, bias, torch.randn_like(x).requires_grad_(), 1e-5))
    torch.library.opcheck(norm_ops.bn_add, (x, weight, bias, None, 1e-5))
    spikes = (torch.rand(6, 12, 3, 5) < 0.5).float().contiguous(memory_format=layout).unflatten(0, (3, 2))
    torch.library.opcheck(attention_ops.attend, (spikes.detach().requires_grad_(), decay, 0.5, 4.0, True))
    with torch.no_grad():
        torch.library.opcheck(norm_ops.affine_lif, (x.detach(), weight, bias, decay, 3, 1.0))
        torch.library.opcheck(norm_ops.affine_add, (x.detach(), weight, bias, torch.randn_like(x)))


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_takes_the_whole_model_as_one_graph(training):
    torch._dynamo.reset()
    model = build(depths=1)
    model.train(training)
    x = images(model)
    with torch.set_grad_enabled(training):
        compiled = torch.compile(build(depths=1).train(training), backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(x)[0].detach(), model(x)[0].detach()) < TOLERANCE
    torch._dynamo.reset()


@needs_kernels
def test_inductor_generates_code_around_the_kernels_and_their_gradients():
    """What --compile does; on one part, since each piece of code takes the compiler seconds."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    part = MS_MLP_Conv(8, 16).double()
    nn.init.constant_(part.fc1_bn.bias, 0.7)
    accelerate(part)
    x = torch.randn(2, 3, 8, 4, 4, dtype=torch.float64)
    found = []
    for call in (copy.deepcopy(part), torch.compile(copy.deepcopy(part), fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out.square().sum().backward()
        weights = [p.grad for n, p in call.named_parameters() if p.grad is not None and n.endswith("weight")]
        found.append([out.detach(), leaf.grad, *weights])
    assert float(found[0][0].detach().std()) > 0.1
    for eager, compiled in zip(*found, strict=True):
        assert relative_error(compiled, eager) < TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_thirty_training_steps_have_the_golden_losses(name):
    meta, tensors = load_tensors(f"trajectory_{name}")
    model = sdt(**model_arguments(meta["cfg"])).double()
    model.load_state_dict(under(tensors, "init"), strict=True)
    settings = dict(lr=meta["lr"], weight_decay=meta["weight_decay"], filter_bias_and_bn=True)
    optimizer = create_optimizer_v2(model, opt=meta["opt"], **settings)
    inputs, targets = tensors["inputs"], tensors["targets"]
    accelerate(model)
    losses = []
    for step in range(meta["steps"]):
        at = step % len(inputs)
        loss = F.cross_entropy(model.train()(inputs[at])[0], targets[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert relative_error(torch.stack(losses), tensors["losses"]) < 1e-7  # the golden data's README
