"""The proof that a network is spike-driven: who passes it, and who is named with the operator and the place."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch
import torch.nn.functional as F
from golden import FORWARD_FILES, load_tensors, model_arguments, under
from golden_v2 import golden_model
from test_synapses import tiny_sdt
from torch import nn

from model import sdt
from module.neuron import make_neuron, sj_neuron
from utils.measure import addition_run
from utils.measure.additions import add_conv, add_rows
from utils.measure.geometry import Geometry
from utils.measure.synapse_counts import count_conv, count_selected
from utils.measure.verify import Verification, verify_spike_driven

T, C = 3, 6


def neuron(**settings):
    return make_neuron(v_threshold=0.5, **settings)


class Net(nn.Module):
    """Data -> layer -> neuron -> what a test does with the spikes -> neuron -> layer -> logits."""

    def __init__(self, use, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.stem, self.fire = nn.Linear(4, C), neuron()
        self.fc, self.fire_again = nn.Linear(C, C), neuron()
        self.head = nn.Linear(C, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
                nn.init.normal_(module.weight, std=0.9)

    def forward(self, x):  # [T, B, N, 4]
        self.x = x
        y = self.head(self.fire_again(self.use(self, self.fire(self.stem(x))))).mean((0, 2))
        del self.x
        return y


def data():
    return torch.randn(T, 2, 5, 4, generator=torch.Generator().manual_seed(1))


class Norm(nn.BatchNorm1d):
    """Over the last dimension."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view(x.shape)


def norm():
    layer = Norm(C)
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.uniform_(layer.running_mean, -0.2, 0.2)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


def through_numpy(x):
    return x * torch.from_numpy(x.detach().numpy().mean(keepdims=True).reshape(1) + numpy.float64(0.3))


def learned(shape):
    return dict(scale=nn.Parameter(torch.full(shape, 1.7)))


class Gate(nn.Module):
    """Has a threshold, but gives no spikes."""

    v_threshold = 1.0

    def forward(self, x):
        return x * torch.sigmoid(x)


ELSEWHERE = torch.full((C,), 0.37, dtype=torch.float64)  # a tensor that no module holds

# name -> (what is done with the spikes, what must be said, parts)
CHEATS = {
    "attention function": (lambda n, s: F.scaled_dot_product_attention(s, s, s), "scaled_dot_product_attention in Net"),
    "attention by softmax": (lambda n, s: torch.softmax(s @ s.mT, -1) @ s, "softmax in Net"),
    "attention module": (
        lambda n, s: n.attn(*[s.flatten(0, 1)] * 3)[0].view(s.shape), "in attn",
        dict(attn=nn.MultiheadAttention(C, 2, batch_first=True)),
    ),
    "einsum of membranes": (lambda n, s: torch.einsum("tbnd,tbmd->tbnm", n.fc(s), n.fc(s)) @ s, "bmm in Net"),
    "@ of membranes": (lambda n, s: n.fc(s) @ n.fc(s).mT @ s, "bmm in Net"),
    "bmm of membranes": (lambda n, s: torch.bmm(*[n.fc(s).flatten(0, 1)[:, :, :5]] * 2)[..., [0] * C], "bmm in Net"),
    "scaled spikes": (lambda n, s: n.fc(s * 0.37), "mul (x 0.37) in Net: scales what enters fc"),
    "divided spikes": (lambda n, s: n.fc(s / 3), "div (x 0.3333) in Net: scales what enters fc"),
    "scaled elements": (
        lambda n, s: n.fc(s) * n.by, "mul in Net: multiplies each element", dict(by=nn.Buffer(torch.rand(C))),
    ),
    "division by a learned number": (lambda n, s: n.fc(s) / n.scale, "div in Net: multiplies by a learn", learned(())),
    "learned scale": (lambda n, s: n.fc(s) * n.scale, "mul in Net: multiplies by a learned", learned((C,))),
    "real values by concat": (
        lambda n, s: n.wide(torch.cat([s, n.fc(s)], -1)), "enter wide", dict(wide=nn.Linear(2 * C, C)),
    ),
    "gate": (lambda n, s: n.fc(s) * torch.sigmoid(n.fc(s)), "sigmoid in Net"),
    "gate by a module": (lambda n, s: n.act(n.fc(s)), "silu in act", dict(act=nn.SiLU())),
    "squares": (lambda n, s: n.fc(s) ** 2, "pow in Net"),
    "product of membranes": (lambda n, s: n.fc(s) * n.fc(s.roll(1)), "mul in Net: multiplies two computed"),
    "batch norm on a membrane path": (lambda n, s: n.norm(n.fc(s) + s), "batch_norm in norm", dict(norm=norm())),
    "batch norm before a layer": (lambda n, s: n.fc(n.norm(s)), "batch_norm in norm", dict(norm=norm())),
    "batch norm beside a shortcut": (
        lambda n, s: (lambda y: n.norm(y) + y)(n.fc(s)), "batch_norm after fc: cannot be folded", dict(norm=norm()),
    ),
    "batch statistics": (
        lambda n, s: n.norm(n.fc(s)), "batch_norm in norm", dict(norm=Norm(C, track_running_stats=False)),
    ),
    "layer norm": (lambda n, s: n.norm(n.fc(s)), "native_layer_norm in norm", dict(norm=nn.LayerNorm(C))),
    "layers without a neuron": (lambda n, s: n.next(n.fc(s)), "enter next", dict(next=nn.Linear(C, C))),
    "layer on averaged spikes": (
        lambda n, s: n.fc(s.mean(0, keepdim=True).expand_as(s)), "mean (x 0.3333) in Net: scales what enters fc",
    ),
    "average pool between layers": (
        lambda n, s: n.wide(n.pool(s.flatten(0, 1))).unflatten(0, s.shape[:2]), "avg_pool2d (x 0.5) in pool: scales",
        dict(pool=nn.AvgPool1d(2), wide=nn.Linear(C // 2, C)),
    ),
    "grid sample": (
        lambda n, s: F.grid_sample(n.fc(s), s.new_zeros(T, 5, C, 2), align_corners=False), "grid_sampler_2d in Net",
    ),
    "fft": (lambda n, s: torch.fft.fft(s).real, "fft_r2c in Net"),
    "bilinear resize": (
        lambda n, s: F.interpolate(n.fc(s), scale_factor=2, mode="bilinear")[..., :C], "upsample_bilinear2d in Net",
    ),
    "recurrent layer": (lambda n, s: n.cell(s.flatten(0, 1))[0].view(s.shape), "in cell", dict(cell=nn.GRU(C, C))),
    "a neuron that gives no spikes": (lambda n, s: n.gate(n.fc(s)), "gate is taken for a neuron", dict(gate=Gate())),
    "the input in a later layer": (
        lambda n, s: n.fc(s) + n.late(n.x), "the input enters a second layer, late", dict(late=nn.Linear(4, C)),
    ),
    "half a shortcut": (lambda n, s: n.fc(s) + 0.5 * s, "mul (x 0.5) in Net: scales a part of what enters"),
    "value read into Python": (lambda n, s: n.fc(s) * float(s.mean()), "item in Net"),
    "value by NumPy": (lambda n, s: through_numpy(n.fc(s)), "computed outside of PyTorch"),
    "tensor from elsewhere": (lambda n, s: n.fc(s) * ELSEWHERE, "of unknown origin"),
    "whole numbers into a layer": (lambda n, s: n.fc(s + s.roll(1)), "other values than 0 and 1 enter fc"),
    "ternary spikes": (lambda n, s: n.fc(s - s.roll(1)), "other values than 0 and 1 enter fc"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*interpolate.*:UserWarning")
@pytest.mark.parametrize("name", CHEATS)
def test_a_network_that_multiplies_is_refused_with_operator_and_place(name):
    use, said, *parts = CHEATS[name]
    proof = verify_spike_driven(Net(use, **(parts[0] if parts else {})), data())
    text = "\n".join(line for line in proof.lines() if line.startswith("FAILED"))
    assert not proof.passed
    assert said in text, text


class OwnNeuron(nn.Module):
    """A hard threshold, written out, without a class that is known."""

    def forward(self, x):
        return (x >= 0.5).to(x.dtype)


# name -> (what is done with the spikes, the constant factor that the next neuron's threshold takes in, parts)
HONEST = {
    "layer": (lambda n, s: n.fc(s), ""),
    "layer and batch norm": (lambda n, s: n.norm(n.fc(s)), "", dict(norm=norm())),
    "two batch norms": (lambda n, s: n.more(n.norm(n.fc(s))), "", dict(norm=norm(), more=norm())),
    "membrane shortcut": (lambda n, s: n.norm(n.fc(s)) + n.fc(s.roll(1)), "", dict(norm=norm())),
    "functional layer": (lambda n, s: F.linear(s, n.fc.weight, n.fc.bias), ""),
    "einsum with weights": (lambda n, s: torch.einsum("tbnd,ed->tbne", s, n.fc.weight), ""),
    "weights scaled by the code": (lambda n, s: F.linear(s, n.fc.weight * 0.5), ""),
    "masks": (lambda n, s: n.fc(s * s.roll(1)) * s, ""),
    "spikes turned over": (lambda n, s: n.fc(1 - s), ""),
    "attention of spikes": (lambda n, s: (s @ (s.roll(1).mT @ s.roll(2))) * 0.125, "mul (x 0.125)"),
    "attention the other way": (lambda n, s: (s @ s.roll(1).mT) * 0.25 @ s.roll(2), "mul (x 0.25)"),
    "scaled membrane": (lambda n, s: n.fc(s) * 0.37, "mul (x 0.37)"),
    "averaged membrane": (lambda n, s: n.fc(s).mean(2, keepdim=True).expand_as(s), "mean (x 0.2)"),
    "max pool": (lambda n, s: n.fc(F.max_pool2d(s, 3, 1, 1)), ""),
    "threshold by hand": (lambda n, s: n.fc(n.mine(n.fc(s))), "", dict(mine=OwnNeuron())),
    "pruned spikes": (lambda n, s: n.fc(s * n.kept), "", dict(kept=nn.Buffer(torch.tensor([1.0, 0, 1, 1, 0, 1])))),
    "concat of spikes": (lambda n, s: n.wide(torch.cat([s, s.roll(1)], -1)), "", dict(wide=nn.Linear(2 * C, C))),
    "grouped, strided and transposed convolutions": (
        lambda n, s: n.up(n.mine(n.down(s.mT.flatten(0, 1)))).mT.unflatten(0, s.shape[:2]), "",
        dict(down=nn.Conv1d(C, 2 * C, 3, stride=2, padding=1, groups=2), mine=OwnNeuron(),
             up=nn.ConvTranspose1d(2 * C, C, 3, stride=2, padding=1, groups=3)),
    ),
    "padding that repeats": (
        lambda n, s: n.conv(s.mT.flatten(0, 1)).mT.unflatten(0, s.shape[:2]), "",
        dict(conv=nn.Conv1d(C, C, 3, padding=1, padding_mode="circular")),
    ),
    "another neuron": (lambda n, s: n.fc(n.other(n.fc(s))), "", dict(other=neuron(spike_mode="klif"))),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_a_network_that_only_adds_passes_and_constants_are_named(name):
    use, factor, *parts = HONEST[name]
    model = Net(use, **(parts[0] if parts else {}))
    proof = verify_spike_driven(model, data())
    assert proof.passed, proof.lines()
    absorbed = [f"{factor} in Net: taken into the threshold of fire_again"] if factor else []
    assert proof.absorbed == [*absorbed, "mean (x 0.06667) in Net: feeds only the output"]
    assert proof.additions == proof.expected
    assert min(proof.additions.values()) > 0
    assert proof.folded == sum(isinstance(part, Norm) for part in model.modules())


class Plain(nn.Module):
    """A plain spiking CNN of SpikingJelly's layers, with a loop over time."""

    def __init__(self, kind=sj_neuron.LIFNode):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), kind(v_threshold=0.3),
            nn.Conv2d(4, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8), kind(v_threshold=0.3),
            nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1, groups=8), kind(v_threshold=0.3), nn.Flatten(),
            nn.Linear(8 * 4, 3),
        )  # fmt: skip

    def forward(self, x):
        return sum(self.body(x) for _ in range(4)) / 4


@pytest.mark.parametrize("kind", [sj_neuron.IFNode, sj_neuron.LIFNode, sj_neuron.ParametricLIFNode])
def test_a_plain_spiking_cnn_passes(kind):
    proof = verify_spike_driven(Plain(kind), torch.rand(2, 1, 8, 8))
    assert proof.passed, proof.lines()
    assert proof.folded == 2 * 4  # in each step
    assert proof.dense_products == 4
    assert proof.absorbed == ["div (x 0.25) in Plain: feeds only the output"]


@pytest.mark.parametrize("name", FORWARD_FILES)
def test_published_models_are_spike_driven(name):
    meta, tensors = load_tensors(name)
    model = sdt(**model_arguments(meta["cfg"]))
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in under(tensors, "state").items()})
    proof = verify_spike_driven(model.eval(), tensors["input"][:2].float())
    assert proof.passed, proof.lines()
    assert proof.additions == proof.expected
    assert sum(proof.additions.values()) > 0
    assert proof.dense_products == 1
    assert proof.folded == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert all("mean" in factor for factor in proof.absorbed)


@pytest.mark.parametrize(
    "changes",
    [dict(spike_mode=mode) for mode in ("lif", "plif", "if", "klif", "qif", "eif", "izhikevich")]
    + [
        dict(dvs_mode=True),
        dict(TET=True),
        dict(num_classes=0),
        dict(pooling_stat="1110"),
    ],
)
def test_every_variant_of_the_model_is_spike_driven_also_with_folded_batch_norms(changes):
    model, x = tiny_sdt(**changes), torch.randn(2, 1, 8, 8)
    assert verify_spike_driven(model, x).passed
    folded = verify_spike_driven(model.fuse(), x)
    assert folded.passed, folded.lines()
    assert folded.folded == 0


def test_an_average_pool_fails_the_proof_by_name():
    model = tiny_sdt()
    model.patch_embed.maxpool1 = nn.AvgPool2d(3, 2, 1)
    proof = verify_spike_driven(model, torch.randn(1, 1, 8, 8))
    assert proof.not_binary == ["patch_embed.proj_conv2"]
    assert (
        "avg_pool2d (x 0.1111) in patch_embed.maxpool1: scales what enters patch_embed.proj_conv2" in proof.unsupported
    )


CONVS = {
    "strided and grouped": nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "dilated and oblong": nn.Conv2d(4, 2, (1, 3), dilation=2, padding=(0, 2)),
    "even": nn.Conv2d(4, 3, 2, bias=False),
    "7 x 7 of each channel": nn.Conv2d(4, 4, 7, padding=3, groups=4),
    "one dimension": nn.Conv1d(4, 6, 3, groups=2, stride=2),
    "three dimensions": nn.Conv3d(4, 2, 2, padding=1),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, output_padding=1),
}


@pytest.mark.parametrize("name", CONVS)
def test_additions_give_what_the_conv_gives(name):
    torch.manual_seed(0)
    conv = CONVS[name].double()
    transposed = isinstance(conv, nn.ConvTranspose2d)
    moves = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    geometry = Geometry(*moves, transposed=transposed, output_padding=conv.output_padding)
    x = (torch.rand(3, 4, *[7, 6, 5][: len(conv.kernel_size)], dtype=torch.float64) < 0.4).double()
    with torch.no_grad():
        y, additions = add_conv(x, conv.weight, geometry)
        bias = 0 if conv.bias is None else conv.bias.view(-1, *[1] * len(conv.kernel_size))
        torch.testing.assert_close(y + bias, conv(x), rtol=0, atol=1e-12)
        assert additions == int(count_conv(x, conv.weight, y, geometry, True).counts[1].sum())
        nn.init.ones_(conv.weight)
        assert additions == int((conv(x) - bias).sum())


def test_additions_of_chosen_rows_are_a_product():
    torch.manual_seed(0)
    spikes, real = (torch.rand(2, 3, 4) < 0.5).double(), torch.rand(2, 4, 5).double()
    y, additions = add_rows(spikes, real)
    torch.testing.assert_close(y, spikes @ real, rtol=0, atol=1e-12)
    assert additions == int(spikes.sum()) * 5 == int(count_selected(spikes, real, True).counts[1].sum())
    others = (real > 0.5).double()
    y, additions = add_rows(spikes, others, pairs=True)
    assert torch.equal(y, spikes @ others)
    assert additions == int(y.sum()) == int(count_selected(spikes, others, True).counts[1].sum())


def test_the_proof_fails_on_logits_counts_values_and_operators():
    good = Verification(2, [], [], 1e-12, {"a": 5}, {"a": 5}, 1)
    assert good.passed
    assert not any("FAILED" in line for line in good.lines())
    for change, wrong in (
        (dict(logits_difference=1e-8), "logits differ by 1.0e-08"),
        (dict(logits_difference=None), ""),
        (dict(additions={"a": 4}), "4 additions done, 5 counted; wrong in a"),
        (dict(additions={"a": 6}), "6 additions done, 5 counted; wrong in a"),
        (dict(additions={"a": 5, "b": 1}), "6 additions done, 5 counted; wrong in b"),
        (dict(expected={"a": 5, "b": 1}), "5 additions done, 6 counted; wrong in b"),
        (dict(not_binary=["b"]), "other values than 0 and 1 enter b"),
        (dict(unsupported=["softmax in b"]), "softmax in b"),
    ):
        bad = replace(good, **change)
        assert not bad.passed, change
        assert any(line.startswith("FAILED") and wrong in line for line in bad.lines()) == bool(wrong), change


def test_a_layer_that_adds_otherwise_fails_the_proof(monkeypatch):
    right = addition_run.add_rows
    monkeypatch.setattr(addition_run, "add_rows", lambda *args: (right(*args)[0] + 1e-6, right(*args)[1]))
    proof = verify_spike_driven(Net(lambda n, s: n.fc(s)), data())
    assert not proof.passed
    assert proof.logits_difference is not None
    assert proof.logits_difference > 1e-9
    assert proof.miscounted == []


def test_v2_passes_in_its_merged_form_and_not_as_trained():
    tensors, model = golden_model("t1_h2")
    trained = verify_spike_driven(model, tensors["input"][:1])
    assert not trained.passed
    assert all(name.endswith((".pwconv2", ".body.2.0", ".body.2.1")) for name in trained.not_binary)
    assert {name.rsplit(".", 1)[-1] for name in trained.not_binary} == {"pwconv2", "0", "1"}
    merged = verify_spike_driven(model.eval().fuse(), tensors["input"][:1])
    assert merged.passed, merged.lines()
    scale = "mul (x 0.125) in block3.0.attn: taken into the threshold of block3.0.attn.attn_lif"
    assert scale in merged.absorbed
    assert merged.additions["block3.0.attn: bmm 2"] > 0
