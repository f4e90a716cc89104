"""Every product that a network runs is in the ledger, or the total says that it is incomplete."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from module.neuron import sj_neuron
from utils.measure.energy import measure_energy
from utils.measure.synapses import SynapseRecorder

T, B, N, D = 2, 3, 5, 8


class Network(nn.Module):
    """Spikes `[T, B, N, D]` that enter what a test asks for, `use(network, spikes)`."""

    def __init__(self, use, **parts):
        super().__init__()
        self.use = use
        self.neuron = sj_neuron.IFNode(step_mode="m")
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.use(self, self.neuron(x))


def spikes(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(T, B, N, D, generator=generator) < 0.4).float()


def rows_of(use, x=None, **parts):
    report = measure_energy(Network(use, **parts), [spikes() if x is None else x])
    return report, {row.name: row for row in report.rows}


ones = int(spikes().sum())


def w(*shape):
    return dict(w=nn.Parameter(torch.ones(shape)))


# name -> (what is run, its parts, name of the row, operations of a spike)
PRODUCTS = {
    "functional linear": (lambda n, s: F.linear(s, n.w), w(4, D), "w", 4),
    "@ with a parameter": (lambda n, s: s @ n.w, w(D, 4), "w", 4),
    "weights on the left": (lambda n, s: n.w @ s, w(7, N), "w", 7),
    "a layer's weights in a function": (lambda n, s: F.linear(s, n.fc.weight), dict(fc=nn.Linear(D, 4)), "fc", 4),
    "einsum": (lambda n, s: torch.einsum("tbnd,ed->tbne", s, n.w), w(4, D), "w", 4),
    "functional conv": (lambda n, s: F.conv1d(s.flatten(0, 1), n.w), w(4, N, 1), "w", 4),
    "transposed conv": (lambda n, s: n.up(s.flatten(0, 1)), dict(up=nn.ConvTranspose1d(N, 4, 3)), "up", 12),
    "a layer called by keyword": (lambda n, s: n.fc(input=s), dict(fc=nn.Linear(D, 4)), "fc", 4),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_weights_are_counted_under_the_name_of_their_weights(name):
    use, parts, row, operations = PRODUCTS[name]
    report, rows = rows_of(use, **parts)
    assert list(rows) == [row]
    assert rows[row].operations == pytest.approx(ones * operations / B)
    assert rows[row].kind == "AC"
    assert rows[row].steps == T
    assert report.incomplete == []
    assert report.notes == []


def test_products_of_spikes_with_spikes_are_pairs_that_meet_and_with_sums_whole_rows():
    """Attention of sums of spikes, q (k^T v): the first product adds ones, the second rows of the first."""
    s = spikes()
    q, k, v = s, s.roll(1, 2), s.roll(2, 3)

    def attend(network, x):
        kv = x.roll(1, 2).transpose(-2, -1) @ x.roll(2, 3)
        return (x @ kv) * 0.125

    report, rows = rows_of(attend)
    first, second = (rows[name] for name in ("Network: bmm", "Network: bmm 2"))
    pairs = sum(int(k[t, b, n].sum() * v[t, b, n].sum()) for t in range(T) for b in range(B) for n in range(N))
    assert first.operations == pairs / B
    assert second.operations == int(q.sum()) * D / B
    assert {first.kind, second.kind} == {"AC"}
    assert first.macs_per_step == second.macs_per_step == N * D * D
    assert report.per_sample.operations.mean == pytest.approx(first.operations + second.operations)


def test_attention_with_softmax_multiplies_real_values_and_is_incomplete():
    for attend in (
        lambda n, s: F.scaled_dot_product_attention(s * 0.3, s * 0.7 + 0.1, s + 0.5),
        lambda n, s: torch.softmax((s * 0.3 + 0.2) @ (s + 0.4).transpose(-2, -1), -1) @ (s * 0.7 + 0.1),
    ):
        report, rows = rows_of(attend)
        assert [row.kind for row in rows.values()] == ["MAC", "MAC"]
        assert {row.macs_per_step for row in rows.values()} == {N * N * D}
        assert report.incomplete == ["softmax in Network"]
        assert report.accounting.startswith("INCOMPLETE, without softmax in Network")
        assert any("softmax in Network" in note for note in report.notes)


def test_multihead_attention_and_recurrent_layers_are_counted_with_all_their_weights():
    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    report, rows = rows_of(lambda n, s: n.attn(*[s.flatten(0, 1)] * 3)[0], attn=attention)
    assert rows["attn.in_proj_weight"].macs_per_step * rows["attn.in_proj_weight"].steps == T * N * 3 * D * D
    assert rows["attn.in_proj_weight"].operations == pytest.approx(ones * 3 * D / B)
    assert "attn.out_proj" in rows
    assert not any("no part of the forward pass" in note for note in report.notes)
    assert torch.backends.mha.get_fastpath_enabled()
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        _, rows = rows_of(lambda n, s: n.cell(s.flatten(0, 1))[0], cell=kind(D, 6))
        done = sum(row.macs_per_step * row.steps for row in rows.values())
        assert done == T * N * gates * 6 * (D + 6), kind


@pytest.mark.parametrize(
    ("use", "operator"),
    [
        (lambda n, s: torch.fft.fft(s).real, "fft_r2c in Network"),
        (lambda n, s: torch.cdist(s, s + 1), "cdist_forward in Network"),
        (lambda n, s: F.layer_norm(s, (D,)), "native_layer_norm in Network"),
        (lambda n, s: ((s + 0.5).unsqueeze(-1) * (s + 0.3).unsqueeze(-2)).sum(-1), "mul of all values with all others"),
    ],
)  # fmt: skip
def test_what_has_no_price_makes_the_total_incomplete_by_name(use, operator):
    report, _ = rows_of(use)
    assert len(report.incomplete) == 1
    assert report.incomplete[0].startswith(operator)


def test_what_stands_unused_in_a_model_is_not_missing():
    report, _ = rows_of(lambda n, s: n.fc(s), fc=nn.Linear(D, 4), table=nn.Embedding(3, 4), rest=nn.Linear(2, 2))
    assert report.incomplete == []
    assert report.notes == ["no part of the forward pass, so not charged: rest"]


@pytest.mark.parametrize(
    ("change", "convention", "factor"),
    [
        (lambda s: s - s.roll(1, 0), "spikes of -1 and 1", 1),
        (lambda s: s * 0.37, "spikes of one size (0.37)", 1),
        (lambda s: s + s.roll(1, 0) + s.roll(1, 1), "whole numbers up to 3", 1),
        (lambda s: s + 0.5, "multiplication", 0),
    ],
)
def test_additions_or_products_are_decided_by_the_values(change, convention, factor):
    values = change(spikes())
    report, rows = rows_of(lambda n, s: n.fc(change(s)), fc=nn.Linear(D, 4), stem=nn.Linear(D, D))
    (row,) = rows.values()
    assert row.kind == "MAC"  # the first layer takes data
    report, rows = rows_of(lambda n, s: n.fc(change(s) + 0 * n.stem(s)), fc=nn.Linear(D, 4), stem=nn.Linear(D, D))
    row = rows["fc"]
    whole = convention.startswith("whole")
    assert row.operations == pytest.approx(float((values.abs() if whole else values.ne(0)).sum()) * 4 / B)
    assert row.kind == ("AC" if factor else "MAC")
    assert convention in row.convention
    assert any("fc" in note for note in report.notes)
    formula = measure_energy(
        Network(lambda n, s: n.fc(change(s) + 0 * n.stem(s)), fc=nn.Linear(D, 4), stem=nn.Linear(D, D)), [spikes()],
        mode="formula",
    )  # fmt: skip
    assert formula.rows[1].operations == pytest.approx(row.operations)  # a linear layer has no padding


def test_neurons_with_a_state_start_anew_with_each_batch():
    model = Network(lambda n, s: n.fc(s), fc=nn.Linear(D, 4))
    x = torch.rand(T, 4, N, D)
    model.neuron.v_threshold = 1.5
    whole = measure_energy(model, [x]).rows[0].operations
    assert measure_energy(model, x.split([3, 1], dim=1)).rows[0].operations == whole
    assert measure_energy(model, [x, x]).rows[0].operations == whole
    assert measure_energy(model, [x, x], reset=False).rows[0].operations > whole


def test_the_counters_leave_other_code_alone():
    model = Network(lambda n, s: n.fc(s), fc=nn.Linear(D, 4))
    with torch.no_grad(), SynapseRecorder(model) as recorder:
        model(spikes())
        torch.softmax(torch.rand(3, 3) @ torch.rand(3, 3), -1)  # the script's own
    counts = recorder.counts()
    assert [row.name for row in counts.layers] == ["fc"]
    assert counts.unpriced == []
