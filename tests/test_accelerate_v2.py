"""The faster ways of V2's parts: equal to the parts as they are written, proved, and aside where a part is another."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model import sdt_v2
from module.accelerate import accelerate, rows
from module.kernels import batchnorm_twice, cpu, depthwise, head_products, parts_v2, proof, spike_conv
from module.kernels.substitute import Substitute
from module.v2.attention import Attention
from module.v2.block import TransformerBlock
from module.v2.conv import ConvBlock, DownSampling, SeparableConv
from module.v2.mlp import MLP
from module.v2.repconv import BorderedBatchNorm

pytestmark = pytest.mark.skipif(cpu.why_unusable() is not None, reason=str(cpu.why_unusable()))

# Of the largest gradient, in float64: only the order of summation differs.
TOLERANCE = 1e-11


def built(**arguments) -> nn.Module:
    """A small model whose neurons fire, in float64."""
    torch.manual_seed(0)
    sizes = dict(embed_dims=(6, 10, 16, 20), num_heads=2, depths=(1, 1), T=3, num_classes=5)
    model = sdt_v2(**(sizes | arguments)).double()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            norm.weight.uniform_(0.8, 1.6)
            norm.bias.uniform_(0.2, 0.9)
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
        # Silent behind the attention, its gradients would have no end.
        for attention in (m for m in model.modules() if isinstance(m, Attention)):
            attention.attn_lif.v_threshold = 1 / 16
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tensors_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits, every gradient and every buffer of a training step; logits of an evaluation after it."""
    logits = model.train()(x)[0]
    logits = torch.cat(logits) if isinstance(logits, tuple) else logits
    (logits.square().sum() + logits.sum()).backward()
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in found.values())
    found = {name: g / largest for name, g in found.items()}
    found |= {"logits": logits.detach(), **{n: b.double() for n, b in model.named_buffers()}}
    with torch.no_grad():
        found["evaluation"] = model.eval()(x)[0]
    return found


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (2, 3, 33, 20)),  # static images of an odd size
        ({"in_channels": 2, "kd": True}, (2, 4, 2, 24, 24)),  # event frames
        ({"T": 1, "num_heads": 4, "depths": (2, 1)}, (3, 3, 32, 32)),
    ],
    ids=["images", "frames", "one step"],
)
def test_logits_gradients_and_statistics_are_those_of_the_plain_model(arguments, shape):
    model = built(**arguments)
    plain = copy.deepcopy(model)
    accelerate(model, prove=False)
    assert [row for row in rows(model) if row.runs_as == "plain"] == []
    expected, found = tensors_of(plain, images(*shape)), tensors_of(model, images(*shape))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_a_static_image_is_convolved_once_unless_its_gradient_is_wanted():
    model = built()
    plain = copy.deepcopy(model)
    accelerate(model, prove=False)
    calls: list[int] = []

    class Watching(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    model.downsample1_1.encode_conv.__class__ = Watching
    model(images(2, 3, 32, 32))
    with torch.no_grad():
        model.eval()(images(2, 3, 32, 32))
    assert calls == [2, 2]
    gradients = []
    for part in (model.train().downsample1_1, plain.downsample1_1):
        leaf = images(2, 3, 32, 32).expand(3, -1, -1, -1, -1).requires_grad_()  # one place in memory, three steps
        y = part(leaf)
        (y * images(*y.shape)).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=TOLERANCE)
    assert all(step.abs().max() > 0 for step in gradients[0])
    assert calls == [2, 2, 6]


def test_blocks_that_run_again_in_the_backward_pass_see_the_same_border():
    model = built()
    plain = copy.deepcopy(model)
    accelerate(model, prove=False)
    model.set_grad_checkpointing(True)
    expected, found = (tensors_of(m, images(2, 3, 32, 32)) for m in (plain, model))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_the_merged_model_has_faster_ways_too():
    model = built().eval().fuse()
    plain = copy.deepcopy(model)
    accelerate(model, training=False)
    assert [row for row in rows(model) if row.runs_as == "plain"] == []
    with torch.no_grad():
        torch.testing.assert_close(model(images(2, 3, 32, 32))[0], plain(images(2, 3, 32, 32))[0], rtol=1e-9, atol=0)


def test_additions_where_spikes_enter_and_nowhere_else():
    model = built().float()
    plain = copy.deepcopy(model)
    accelerate(model, engine="sparse", training=False)
    x = images(2, 3, 32, 32).float()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x)[0], plain.eval()(x)[0], rtol=1e-4, atol=1e-5)
    added = {n: m.counts for n, m in model.named_modules() if hasattr(m, "counts")}
    of_spikes = {n for n in added if n.endswith(("pwconv1", "conv1", "conv2", "body.0", "fc1_conv", "fc2_conv"))}
    assert set(added) == of_spikes | {"downsample4.encode_conv"}
    assert len(of_spikes) == 4 * 3 + 2 * 6
    # q, k and v are one product, under the name of the first.
    silent = {name for name, counts in added.items() if counts is None}
    assert {name.split(".")[3] for name in silent} == {"k_conv", "v_conv"}
    assert all(int(counts[1]) > 0 for name, counts in added.items() if counts is not None and "proj" not in name)


def parts() -> dict[str, nn.Module]:
    """One of each kind, on its own; each has what `accelerate` asks a model for."""
    torch.manual_seed(0)
    return {
        "image": DownSampling(3, 8, kernel_size=7, first=True),
        "down": DownSampling(8, 12),
        "separable": SeparableConv(8),
        "block": ConvBlock(8),
        "attention": Attention(16, 2),
        "mlp": MLP(8, 32),
        "transformer": TransformerBlock(16, 2),
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_each_part_passes_its_proof(dtype):
    for part in parts().values():
        accelerate(part, amp_dtype=dtype)
        assert isinstance(part, Substitute), rows(part)


def times(value: float, real):
    """The operator with its first result off by a share."""

    def wrong(*arguments):
        out = real(*arguments)
        return (out[0] * value, *out[1:]) if isinstance(out, tuple) else out * value

    return wrong


def without_border(*arguments, real=depthwise._affine):
    scale, shift, border = real(*arguments)
    return scale, shift, border * 0


def of_one_copy(norm, x, steps, real=parts_v2.norm_add):
    """The running variance of one image in place of that of T copies."""
    return real(norm, x).expand(steps, *x.shape[1:])


WRONG = {
    "depthwise": (depthwise, "of_spikes", times(1.001, depthwise.of_spikes), "separable"),
    "behind BatchNorm": (depthwise, "behind_batchnorm", times(1.01, depthwise.behind_batchnorm), "attention"),
    "border": (depthwise, "_affine", without_border, "attention"),
    "products": (parts_v2, "head_products", times(0.5, parts_v2.head_products), "attention"),
    "convolution": (parts_v2, "spike_conv2d", times(1.001, parts_v2.spike_conv2d), "mlp"),
    "image": (parts_v2, "norm_add", of_one_copy, "image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operator_is_found_and_the_part_runs_plain(name, monkeypatch, caplog):
    file, function, wrong, kind = WRONG[name]
    part = parts()[kind]
    monkeypatch.setattr(file, function, wrong)
    with caplog.at_level(logging.WARNING, "sdt"):
        accelerate(part)
    assert not isinstance(part, Substitute)
    assert any("runs plain: " in record.message for record in caplog.records)


# ---- what is another part runs as it is written ----------------------------------------------------------------------


class OwnAttention(Attention):
    """q alone."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.flatten(3)


def test_an_attention_of_ones_own_runs_inside_a_faster_block():
    model = built(attn_layer=OwnAttention)
    plain = copy.deepcopy(model)
    accelerate(model)
    found = {row.part: row.why_not_faster for row in rows(model) if row.runs_as == "plain"}
    assert found == {"OwnAttention": "derived from Attention: its own code runs"}
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("owner", "method", "own", "name"),
    [
        (Attention, "_attend", OwnAttention._attend, "Attention"),
        (BorderedBatchNorm, "border", lambda self: torch.ones_like(self.bn.bias), "Attention"),
        (SeparableConv, "forward", lambda self, x: self.bn2(x.flatten(0, 1)).view_as(x), "SeparableConv"),
    ],
    ids=["attention", "border", "separable"],
)
def test_an_edited_method_runs_and_one_line_says_so(owner, method, own, name, monkeypatch, caplog):
    model = built()
    before = copy.deepcopy(model).eval()(images(1, 3, 32, 32))[0]
    monkeypatch.setattr(owner, method, own)
    plain = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "sdt"):
        accelerate(model, prove=False)
    (line,) = [record.message for record in caplog.records]
    assert f"{name} runs plain: module.v2." in line
    x = images(2, 3, 32, 32)
    for training in (True, False):
        ours, theirs = (m.train(training)(x)[0] for m in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(before, plain.eval()(images(1, 3, 32, 32))[0], atol=1e-6), "the edit would not show"


def test_a_layer_that_is_watched_sees_what_it_sees_in_the_plain_model():
    model = built()
    plain = copy.deepcopy(model)
    accelerate(model, prove=False)
    seen: list[list[Tensor]] = [[], []]
    for m, values in zip((model, plain), seen, strict=True):
        for layer in (m.block3[0].attn.k_conv[0].body[1], m.block4[0].mlp.fc2_lif, m.ConvBlock2_1[0].Conv.pwconv2):
            layer.register_forward_hook(lambda _, args, out, values=values: values.extend((args[0], out)))
        m(images(2, 3, 32, 32))
    assert len(seen[0]) == 6
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-9, atol=1e-12)


def test_the_proof_sees_every_neuron_fire():
    for name, part in parts().items():
        fast = copy.deepcopy(part)
        fast.__class__ = next(level[type(part)] for level in parts_v2.PARTS_V2 if type(part) in level)
        reference = copy.deepcopy(part).double()
        generator = torch.Generator().manual_seed(0)
        x = proof._redraw(reference, fast, proof._input(part, 4, generator), generator)
        rates: dict[str, float] = {}
        for path in fast.neurons:
            if path in dict(reference.named_modules()):
                reference.get_submodule(path).register_forward_hook(
                    lambda _, args, out, path=path, rates=rates: rates.update({path: float(out.mean())})
                )
        with torch.no_grad():
            reference(x)
        assert len(rates) == len(fast.neurons) - (name == "image")
        assert all(0.03 < rate < 0.97 for rate in rates.values()), (name, rates)


# ---- operators -------------------------------------------------------------------------------------------------------


def spikes(*shape: int) -> Tensor:
    return (images(*shape) > 0.5).double()


@pytest.mark.parametrize("k", depthwise.KERNELS)
@pytest.mark.parametrize(("C", "H", "W"), [(5, 1, 9), (16, 6, 6), (35, 4, 7)])
def test_the_depthwise_kernels_are_torchs_convolution(k, C, H, W):
    x, w, g = images(2, C, H, W), images(C, 1, k, k), images(2, C, H, W).flip(0)
    inner = [spike_conv.innermost(t) for t in (x, g)]
    out = spike_conv.empty(x, *x.shape)
    cpu.depthwise(inner[0], None, w.flatten(1).T.contiguous(), out)
    weight = w.clone().requires_grad_()
    expected = F.conv2d(x, weight, padding=k // 2, groups=C)
    expected.backward(g)
    torch.testing.assert_close(out, expected.detach())
    sums = cpu.depthwise_weight_gradient(inner[0], None, inner[1], k)
    torch.testing.assert_close(sums.T.reshape(w.shape), weight.grad)
    scale, shift, border = (images(C) + i for i in range(3))
    cpu.depthwise(inner[0], (scale, shift, border), w.flatten(1).T.contiguous(), out)
    p = k // 2
    bordered = border.view(1, C, 1, 1).expand(2, C, H + 2 * p, W + 2 * p).clone()
    bordered[:, :, p : p + H, p : p + W] = x * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(out, F.conv2d(bordered, w, groups=C))


@pytest.mark.parametrize(("k", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3)])
def test_a_convolution_of_spikes_has_torchs_gradients_from_bits(k, stride, padding):
    x, given = spikes(2, 5, 9, 6), [images(7, 5, k, k), images(7)]
    results = []
    for function in (F.conv2d, spike_conv.spike_conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, *given)]
        out = function(*leaves, stride, padding)
        (out * images(*out.shape)).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[1], results[0])
    frozen = x.clone().requires_grad_()
    out = spike_conv.spike_conv2d(frozen, given[0], None, stride, padding)
    (out * images(*out.shape)).sum().backward()
    torch.testing.assert_close(frozen.grad, results[0][1])


def test_operators_have_shapes_and_gradients_for_compilers():
    x, check = spikes(2, 3, 4, 5, 6), ("test_schema", "test_autograd_registration", "test_faketensor")
    flat, dw, pw = spike_conv.innermost(x.flatten(0, 1)), images(4, 1, 3, 3), images(6, 4, 1, 1)
    values = [images(4) + 2 for _ in range(4)]
    dw, pw, w = (t.requires_grad_() for t in (dw, pw, images(6, 4, 3, 3)))
    w3 = [images(4).requires_grad_(), images(4).flip(0).requires_grad_()]
    for operator, arguments in (
        (spike_conv._spike_conv2d, (flat, w, None, 2, 1, True)),
        (depthwise._of_spikes, (flat, dw, pw, True)),
        (depthwise.behind_affine, (flat, *values[:2], dw.detach(), pw.detach(), 1)),
        (depthwise.behind_batchnorm, (flat, *values, dw, pw, 1, 0.1, 1e-5)),
        (batchnorm_twice.bn_bn_lif, (x, w3[0], w3[1], w3[0], w3[1], 1e-5, 1e-5, 0.5, 1.0, 4.0)),
        (batchnorm_twice.bn_bn_add, (x, w3[0], w3[1], w3[0], w3[1], x, 1e-5, 1e-5)),
        (head_products._head_products, (spikes(2, 3, 12, 3, 2).requires_grad_(), 2, 0.125, True)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=check)
