"""What a researcher writes is what runs: substitutes stand for exact, unedited classes, and prove themselves."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import types

import pytest
import torch
from spikingjelly.activation_based import neuron as sj_neuron
from tiny import lively, tiny
from torch import Tensor, nn

from model import sdt
from module.accelerate import accelerate, detach, for_evaluation, rows
from module.attention import MS_SSA_Conv
from module.fingerprint import fingerprint, found
from module.kernels import attention, batchnorm, cpu, neurons, parts, parts_v2, pool, proof
from module.kernels import lif as lif_file
from module.kernels.substitute import Substitute, plain_class
from module.neuron import LIF, SPIKE_MODES, SpikingNode, make_neuron
from module.sparse.conv import SparseConv2d
from module.sparse.inference import ON_BITS, SparseInference

pytestmark = pytest.mark.skipif(cpu.why_unusable() is not None, reason=str(cpu.why_unusable()))

# float32 sums in another order.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def built(**arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return lively(tiny(**arguments))


def runs_as(model: nn.Module, part: str) -> str:
    return next(row.runs_as for row in rows(model) if row.part == part)


def why_not_faster(model: nn.Module, part: str) -> str:
    return next(row.why_not_faster for row in rows(model) if row.part == part)


# ---- own classes -----------------------------------------------------------------------------------------------------


class NoLeak(LIF):
    """Integrates without a leak."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x


class KeepsAll(MS_SSA_Conv):
    """Masks nothing."""

    def _attend(self, s: Tensor) -> Tensor:
        return s


@pytest.mark.parametrize("training", [True, False])
def test_a_derived_neurons_own_charge_equation_runs(training):
    x = 0.6 * torch.ones(4, 2, 3)
    own, leaky = (accelerate(kind(step_mode="m").train(training)) for kind in (NoLeak, LIF))
    assert own(x).flatten(1)[:, 0].tolist() == [0, 1, 0, 1]  # potentials 0.6, 1.2 -> 0, 0.6, 1.2
    assert leaky(x).sum() == 0
    assert runs_as(own, "NoLeak") == "plain"
    assert isinstance(leaky, Substitute)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_derived_attention_runs_in_training_and_in_evaluation(engine):
    model = built(attn_layer=KeepsAll)
    plain = copy.deepcopy(model)
    accelerate(model, engine=engine)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(images())[0], plain.train(training)(images())[0], **CLOSE)
    other = built()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        evaluated = for_evaluation(model.eval())(images())[0]
        torch.testing.assert_close(evaluated, plain.eval()(images())[0], **CLOSE)
        assert not torch.allclose(evaluated, other.eval()(images())[0], atol=1e-3), "its attention would not show"
    assert "derived from MS_SSA_Conv" in why_not_faster(model, "KeepsAll")
    assert runs_as(model, "MS_MLP_Conv") == "compiled kernels"


def test_methods_that_are_replaced_after_the_start_run():
    calls: list[str] = []

    def own_charge(self: LIF, x: Tensor) -> None:
        calls.append("charge")
        self.v = self.v + x

    def own_attend(self: MS_SSA_Conv, s: Tensor) -> Tensor:
        calls.append("attend")
        return s

    model = accelerate(built())
    block = model.block[0]
    block.mlp.fc2_lif.neuronal_charge = types.MethodType(own_charge, block.mlp.fc2_lif)
    block.attn._attend = types.MethodType(own_attend, block.attn)
    model.train()(images())
    assert set(calls) == {"charge", "attend"}
    with torch.no_grad():
        calls.clear()
        model.eval()(images())
    assert set(calls) == {"charge", "attend"}
    assert for_evaluation(accelerate(model, engine="sparse")) is model


def test_a_method_replaced_in_the_class_runs(monkeypatch):
    model = accelerate(built())
    monkeypatch.setattr(MS_SSA_Conv, "_attend", KeepsAll._attend)
    plain = built(attn_layer=KeepsAll)
    torch.testing.assert_close(model.train()(images())[0], plain.train()(images())[0], **CLOSE)


# ---- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [parts.FusedSPS, parts.FusedSSA, parts.FusedMLP, neurons.KernelLIF, neurons.KernelParametricLIF,
             neurons.CupyLIF, neurons.CupyParametricLIF, SparseInference,
             *(fast for level in parts_v2.PARTS_V2 for fast in level.values())], ids=lambda kind: kind.__name__
)  # fmt: skip
def test_fingerprints_are_those_of_the_code(kind):
    now = {name: fingerprint(getattr(*found(name))) for name in kind.stands_for}
    assert kind.stands_for == now, "a plain method changed: change the substitute likewise, then its fingerprint"


def edited_attend(self: MS_SSA_Conv, s: Tensor) -> Tensor:
    return self.q_lif(s)


@pytest.mark.parametrize("prove", [True, False])
@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_an_edited_method_runs_and_one_line_says_so(engine, prove, monkeypatch, caplog):
    monkeypatch.setattr(MS_SSA_Conv, "_attend", edited_attend)
    with caplog.at_level(logging.WARNING, "sdt"):
        model = accelerate(built(), engine=engine, prove=prove)
    (line,) = [record.message for record in caplog.records if "MS_SSA_Conv" in record.message]
    assert "MS_SSA_Conv runs plain: module.attention:MS_SSA_Conv._attend differs" in line
    assert not isinstance(model.block[0].attn, Substitute)
    assert isinstance(model.block[0].mlp, Substitute)
    assert for_evaluation(model.eval()) is model


def test_comments_and_layout_do_not_change_a_fingerprint(tmp_path):
    namespaces = []
    texts = (
        "def f(x):\n    return x + 1\n",
        'def f(x):\n    """What it does."""\n    # why\n    return (\n        x + 1\n    )\n',
        "def f(x):\n    return x + 2\n",
    )
    for i, text in enumerate(texts):
        file = tmp_path / f"m{i}.py"
        file.write_text(text)
        namespace: dict[str, object] = {}
        exec(compile(text, str(file), "exec"), namespace)
        namespaces.append(fingerprint(namespace["f"]))
    assert namespaces[0] == namespaces[1] != namespaces[2]
    assert fingerprint(len) == ""  # no source: equal to no known fingerprint


# ---- numbers ---------------------------------------------------------------------------------------------------------


def slightly(wrong: float):
    """A kernel whose threshold is off by a share."""
    real = batchnorm.bn_lif
    return lambda x, w, b, d, steps, eps, threshold, alpha: real(x, w, b, d, steps, eps, threshold * (1 + wrong), alpha)


def more_variance(*arguments, real=batchnorm.bn_add):
    out, mean, var = real(*arguments)
    return out, mean, var * 1.01


WRONG = {
    "threshold": (batchnorm, "bn_lif", slightly(0.1), ["MS_SPS", "MS_SSA_Conv", "MS_MLP_Conv"]),
    "surrogate": (
        batchnorm, "bn_lif",
        lambda x, w, b, d, steps, eps, th, alpha, f=batchnorm.bn_lif: f(x, w, b, d, steps, eps, th, alpha * 1.001),
        ["MS_SPS", "MS_SSA_Conv", "MS_MLP_Conv"],
    ),
    "variance": (batchnorm, "bn_add", more_variance, ["MS_SPS", "MS_SSA_Conv", "MS_MLP_Conv"]),
    "shift": (
        batchnorm, "affine_add", lambda x, s, h, r, f=batchnorm.affine_add: f(x, s, h + 1e-4, r),
        ["MS_SPS", "MS_SSA_Conv", "MS_MLP_Conv"],
    ),
    "mask": (
        attention, "attend", lambda q, d, th, a, keep, f=attention.attend: f(q, d, 3 * th, a, keep), ["MS_SSA_Conv"],
    ),
    "pool": (pool, "max_pool", lambda x: nn.functional.avg_pool2d(x, 3, 2, 1), ["MS_SPS"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found_and_the_part_runs_plain(name, monkeypatch, caplog):
    file, function, wrong, found_in = WRONG[name]
    expected = [built().train(training)(images())[0] for training in (True, False)]
    monkeypatch.setattr(file, function, wrong)
    with caplog.at_level(logging.WARNING, "sdt"):
        model = accelerate(built())
    assert [row.part for row in rows(model) if row.runs_as == "plain"] == found_in
    assert len([r for r in caplog.records if "runs plain: " in r.message and "differs by" in r.message]) == len(
        found_in
    )
    actual = [copy.deepcopy(model).train(training)(images())[0] for training in (True, False)]
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_a_kernel_that_raises_leaves_the_part_plain(monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise RuntimeError("illegal instruction\nmore")

    monkeypatch.setattr(cpu, "lif_forward", broken)
    model = accelerate(built())
    assert "RuntimeError: illegal instruction" in why_not_faster(model, "LIF")
    assert not any(isinstance(part, LIF) and isinstance(part, Substitute) for part in model.modules())
    model.train()(images())[0].sum().backward()
    assert [r.message for r in caplog.records if "illegal instruction" in r.message and "LIF" in r.message]


def test_wrong_additions_are_found(monkeypatch):
    from module.sparse import conv, program

    real = conv.sparse_conv2d
    monkeypatch.setattr(
        conv, "sparse_conv2d", lambda x, w, b, **options: (lambda out, n: (out * 1.001, n))(*real(x, w, b, **options))
    )
    model = accelerate(built(), engine="sparse")
    assert not any(isinstance(part, SparseConv2d) for part in model.modules())
    monkeypatch.undo()
    model = accelerate(built(), engine="sparse").eval()
    assert isinstance(for_evaluation(model), SparseInference)
    decay = program.Neuron.of
    monkeypatch.setattr(program.Neuron, "of", lambda node: program.Neuron(0.4, decay(node).threshold))
    monkeypatch.setattr("module.accelerate._on_bits", {})
    assert for_evaluation(model) is model


def test_the_proof_sees_every_neuron_fire():
    """At 5 to 95%, with no potential near the threshold: else equal spikes would prove nothing."""
    model = sdt(img_size=32, embed_dims=64, depths=1, num_classes=10, spike_mode="plif", pooling_stat="0011")
    for part in (model.patch_embed, model.block[0].attn, model.block[0].mlp):
        fast = copy.deepcopy(part)
        fast.__class__ = parts.PARTS[type(part)]
        for training in (True, False):
            reference = copy.deepcopy(part).double().train(training)
            generator = torch.Generator().manual_seed(0)
            x = proof._redraw(reference, fast, proof._input(part, 4, generator), generator)
            seen: dict[str, float] = {}
            for name in fast.neurons:
                reference.get_submodule(name).register_forward_hook(
                    lambda m, args, out, name=name, seen=seen: seen.update({name: float(out.mean())})
                )
            with torch.no_grad():
                reference(x)
            assert set(seen) == set(fast.neurons)
            assert all(0.05 < rate < 0.95 for rate in seen.values()), seen


# ---- attaching -------------------------------------------------------------------------------------------------------


def test_the_model_and_the_random_state_stay_as_they_were():
    model = built()
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    accelerate(model, engine="sparse")
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    detach(model)
    assert not any(isinstance(part, Substitute) for part in model.modules())


def test_a_copy_computes_with_its_own_weights_and_pickles():
    model = accelerate(built(), engine="sparse")
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    expected = built().train()(images())[0]
    torch.testing.assert_close(twin.train()(images())[0], expected, **CLOSE)
    assert [type(part) for part in twin.modules()] == [type(part) for part in model.modules()]
    again = pickle.loads(pickle.dumps(twin))
    torch.testing.assert_close(again(images())[0], twin(images())[0])
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)


def test_what_was_not_proved_runs_plain(monkeypatch):
    model = accelerate(built())
    fast = []
    monkeypatch.setattr(neurons.KernelNeuron, "fast_forward", lambda self, x: fast.append(self))
    monkeypatch.setattr(parts.FusedMLP, "fast_forward", lambda self, x: fast.append(self))
    monkeypatch.setattr(parts.FusedSSA, "fast_forward", lambda self, x: fast.append(self))
    monkeypatch.setattr(parts.FusedSPS, "fast_forward", lambda self, x: fast.append(self))
    model.double()(images().double())
    with torch.autocast("cpu", torch.bfloat16):
        model.float().block[0].mlp(torch.randn(2, 1, 16, 4, 4, dtype=torch.bfloat16))
    assert not fast
    model.block[0].mlp(torch.randn(2, 1, 16, 4, 4))
    assert fast


def test_children_called_alone_give_what_they_are():
    model, plain = accelerate(built()), built()
    x = torch.randn(2, 3, 16, 4, 4)
    for name in ("proj_bn3", "proj_conv3", "maxpool3"):
        ours, theirs = (m.patch_embed.get_submodule(name) for m in (model, plain))
        y = x[0] if name != "proj_conv3" else torch.randn(3, 8, 4, 4)
        assert type(ours) is type(theirs)
        assert torch.equal(ours(y), theirs(y))


def test_a_neuron_chosen_by_name_is_the_neuron_that_runs(monkeypatch):
    """And no substitute that contains another one; BatchNorm, pooling and convolution do not depend on it."""
    pooled, fused = [], []
    real = pool.max_pool
    monkeypatch.setattr(pool, "max_pool", lambda x: (pooled.append(True), real(x))[1])
    monkeypatch.setattr(batchnorm, "bn_lif", lambda *_: fused.append(True))
    model = accelerate(built(), neuron_backend="torch", prove=False)
    model.train()(images())
    assert pooled
    assert not fused
    assert {type(part) for part in model.modules() if isinstance(part, sj_neuron.BaseNode)} == {LIF}
    assert runs_as(model, "LIF") == "SpikingJelly's torch code"
    model = accelerate(model, kernels="plain")
    assert not any(isinstance(part, Substitute) for part in model.modules())
    assert why_not_faster(model, "MS_SPS") == "kernels: plain"
    model = accelerate(model, kernels="plain", neuron_backend="lean")
    assert {type(p) for p in model.modules() if isinstance(p, Substitute)} == {neurons.KernelLIF}
    assert runs_as(model, "LIF") == "lean kernel"


def test_all_processes_attach_what_passed_in_each():
    seen = []

    def agree(mine):
        seen.append(mine)
        return {kind: "rank 1: it differs" if "FusedMLP" in kind else answer for kind, answer in mine.items()}

    model = accelerate(built(), agree=agree)
    assert all(answer is None for answers in seen for answer in answers.values())
    assert why_not_faster(model, "MS_MLP_Conv") == "rank 1: it differs"
    assert runs_as(model, "MS_SSA_Conv") == "compiled kernels"


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_shapes_can_be_computed_without_a_device(engine):
    with torch.device("meta"):
        model = accelerate(tiny(), engine=engine, prove=False)
        logits, _ = model(torch.empty(3, 3, 16, 16))
    assert logits.shape == (3, 5)


def test_a_plain_model_computes_shapes_without_a_device():
    with torch.device("meta"):
        assert tiny()(torch.empty(3, 3, 16, 16))[0].shape == (3, 5)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_folded_model_is_accelerated_after_its_proof(engine):
    model = built().eval().fuse()
    plain = copy.deepcopy(model)
    accelerate(model, engine=engine, training=False)
    assert [row.part for row in rows(model) if row.runs_as == "plain"] == []
    with torch.no_grad():
        torch.testing.assert_close(model(images())[0], plain(images())[0], **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"kernels": "fast"}, "kernels='fast' is not one of auto, plain"), ({"engine": "events"}, "auto, dense, sparse")],
)
def test_unknown_names_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        accelerate(tiny(), **arguments)


def test_every_way_on_bits_stands_for_its_part():
    for kind, fast in ON_BITS.items():
        assert fast.plain_class is kind
        assert issubclass(fast, kind)


# ---- every neuron ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SPIKE_MODES)
def test_every_neuron_keeps_its_state_for_one_pass_and_trains_in_the_model(mode):
    neuron = make_neuron(mode)
    x = 3 * torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(3))
    expected = neuron(x)
    for other in (torch.ones(2, 3), torch.ones(4, 2, 6, requires_grad=True)):
        neuron(other)
        assert torch.equal(neuron(x), expected), "its state lives for one pass"
    assert torch.equal(copy.deepcopy(neuron).eval()(x), expected)
    assert torch.equal(neuron(x[:, 2:3]), expected[:, 2:3]), "samples know nothing of each other"
    assert isinstance(neuron, SpikingNode)
    plain = built(spike_mode=mode).train()
    model = accelerate(copy.deepcopy(plain))
    logits = [m(images())[0] for m in (plain, model)]
    torch.testing.assert_close(*logits, **CLOSE)
    logits[1].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {plain_class(m) for m in model.modules() if isinstance(m, sj_neuron.BaseNode)} == {SPIKE_MODES[mode]}


def test_surrogates_and_arguments_of_a_neuron_reach_it():
    neuron = make_neuron("lif", surrogate="atan", surrogate_alpha=3.0, neuron_args={"tau": 3.0, "v_reset": None})
    assert (neuron.tau, neuron.v_reset, neuron.surrogate_function.alpha) == (3.0, None, 3.0)
    assert type(neuron.surrogate_function).__name__ == "ATan"
    x = 2 * torch.rand(3, 4, requires_grad=True)
    plain = neuron(x)
    accelerate(neuron)
    assert torch.equal(neuron(x), plain), "the kernels know no soft reset"


def test_spikingjellys_own_node_is_refused_with_the_remedy():
    from module.neuron import register_neuron

    register_neuron("bare", sj_neuron.IFNode)
    try:
        with pytest.raises(ValueError, match=r"IFNode would keep its membrane potential.*class IFNode\(SpikingNode"):
            make_neuron("bare")
        with pytest.raises(ValueError, match="spike_mode 'lif' is the name of"):
            register_neuron("lif", sj_neuron.IFNode)
    finally:
        del SPIKE_MODES["bare"]


def test_the_neuron_operator_is_what_the_kernel_neuron_calls(monkeypatch):
    calls = []
    real = lif_file.lif
    monkeypatch.setattr(neurons, "lif", lambda *arguments: (calls.append(arguments[-1]), real(*arguments))[1])
    accelerate(make_neuron(), prove=False)(torch.ones(2, 3))
    assert calls == ["cpp"]
