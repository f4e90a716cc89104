"""Firing rates: exact integers whatever the batches, the paper's names, and the files."""

from __future__ import annotations

import csv

import pytest
import torch
from golden import table_s1
from tiny import lively, tiny
from torch import nn

from model import SpikeDrivenTransformer
from utils.measure.firing import FiringRecorder, FiringRow, as_dict, write_csv
from utils.measure.sdt.names import paper_name
from utils.report.cells import rate_cells
from utils.report.page import rate_bars
from utils.report.tables import terminal
from utils.run.distributed import Process

ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


class Source(nn.Module):
    """Hands its input on: a spike tensor `[T, B, ...]` of the test's choice."""

    def forward(self, spikes):
        return spikes


def spikes_at(rate, steps, batch, size=20):
    """`[T, B, size]` of which exactly the share `rate` fires at each step."""
    flat = torch.zeros(steps, batch * size)
    flat[:, : round(rate * batch * size)] = 1
    return flat.reshape(steps, batch, size)


def recorded(*batches):
    source = Source()
    with FiringRecorder({"head_lif": source}) as recorder:
        for batch in batches:
            source(batch)
    return recorder.rows(ALONE)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.bool])
def test_counts_are_those_of_a_plain_loop(dtype):
    spikes = (torch.rand(3, 4, 2, 5, generator=torch.Generator().manual_seed(0)) < 0.3).to(dtype)
    by_loop = [sum(int(value) for value in step.flatten().tolist()) for step in spikes]
    row = recorded(spikes)
    assert row.spikes == row.nonzero == by_loop
    assert all(type(count) is int for count in row.spikes)
    assert row.elements_per_step == 4 * 2 * 5
    assert row.rate == [count / 40 for count in by_loop]
    assert row.mean_rate == sum(by_loop) / 120


def test_half_precision_counts_beyond_2048_are_exact():
    assert recorded(torch.ones(1, 3, 4099, dtype=torch.float16)).spikes == [3 * 4099]


def test_three_equal_batches_at_a_quarter_report_a_quarter():
    row = recorded(*[spikes_at(0.25, steps=4, batch=2)] * 3)
    assert row.rate == [0.25] * 4
    assert row.mean_rate == 0.25


def test_one_batch_is_enough():
    assert recorded(spikes_at(0.5, steps=2, batch=1)).rate == [0.5, 0.5]


def test_a_smaller_last_batch_counts_by_its_size():
    row = recorded(spikes_at(0.1, steps=2, batch=8), spikes_at(0.1, steps=2, batch=8), spikes_at(0.9, steps=2, batch=1))
    assert row.mean_rate == (2 * 16 + 18) / (17 * 20)


@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_any_number_of_time_steps_is_kept_apart(steps):
    spikes = torch.zeros(steps, 2, 10)
    for t in range(steps):
        spikes[t, 0, : t % 10 + 1] = 1
    row = recorded(spikes, spikes)
    assert row.spikes == [2 * (t % 10 + 1) for t in range(steps)]
    assert len(row.rate) == steps


def test_batches_of_different_lengths_in_time_are_refused():
    with pytest.raises(ValueError, match="head_lif: this batch has 3 time steps, those before 2"):
        recorded(torch.zeros(2, 1, 4), torch.zeros(3, 1, 4))


@pytest.mark.parametrize("values", [[0.5, 0.5], [2.0, 0.0], [-1.0, 1.0], [0.5, 1.5], [float("nan"), 0.0]])
def test_values_that_are_no_spikes_are_told_apart_and_count_where_they_are_not_zero(values):
    row = recorded(torch.tensor(values).reshape(1, 1, 2))
    assert not row.is_binary
    assert row.mean_rate == sum(value != 0 for value in values) / 2
    assert recorded(torch.tensor([[[0.0, 1.0]]])).is_binary


def test_a_tensor_that_was_never_computed_is_refused():
    with pytest.raises(ValueError, match="head_lif: no batch passed"):
        recorded()


def test_hooks_are_removed_after_an_exception():
    source = Source()
    recorder = FiringRecorder({"head_lif": source})
    with pytest.raises(TypeError), recorder:
        source(torch.ones(1, 1, 2), "one argument too many")
    assert not source._forward_hooks
    with recorder:
        source(torch.ones(1, 1, 2))
    source(torch.ones(1, 1, 2))
    assert not source._forward_hooks
    assert recorder.rows(ALONE)[0].spikes == [2]


def test_batch_size_does_not_change_a_single_count_of_a_model():
    torch.manual_seed(0)
    model = lively(tiny()).double().eval()
    data = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    found = []
    for batch_size in (1, 7, 8):
        with FiringRecorder(model.spike_sources()) as recorder, torch.no_grad():
            for batch in data.split(batch_size):
                model(batch)
        found.append(recorder.rows(ALONE))
    assert found[0] == found[1] == found[2]
    _, hook = model(data, hook={})
    assert [row.name for row in found[0]] == list(hook)
    for row in found[0]:
        assert row.spikes == [int(step.sum()) for step in hook[row.name]], row.name
        assert row.elements_per_step == hook[row.name][0].numel()
    assert all(0 < row.mean_rate < 1 for row in found[0])


def test_paper_names_are_those_of_table_s1_for_every_tensor_of_a_model():
    with torch.device("meta"):
        sources = SpikeDrivenTransformer(depths=8).spike_sources()
    in_table = table_s1()
    for name in sources:
        ours = paper_name(name)
        if name.endswith("_kv_before"):  # inside g, not in the table
            assert ours.endswith(" Q_S * K_S")
            continue
        row = in_table.pop(name)
        section, tensor = row["section"], row["tensor"]
        assert ours.startswith(section.replace("B", "block ") if section != "Head" else "head")
        plain = tensor.replace("Output of SDSA(·), hat VS", "SDSA output, masked VS").casefold()
        assert ours.replace("_", "").casefold().endswith(plain)
    assert not in_table
    assert paper_name("something_else") == ""


ROWS = [
    FiringRow("MS_SPS_lif", "SPS Conv1", 10, [1, 2, 3], [1, 2, 3]),
    FiringRow("head_lif", "head FC", 4, [0, 4, 1], [0, 4, 1]),
]


def test_a_row_for_json_holds_counts_and_rates():
    assert as_dict(ROWS[1]) == {
        "name": "head_lif",
        "paper_name": "head FC",
        "elements_per_step": 4,
        "spikes": [0, 4, 1],
        "nonzero": [0, 4, 1],
        "rate": [0.0, 1.0, 0.25],
        "nonzero_rate": [0.0, 1.0, 0.25],
        "mean_rate": 5 / 12,
        "mean_nonzero_rate": 5 / 12,
        "mean_interval": None,
    }


def test_csv_has_one_line_per_tensor_and_step_with_full_precision(tmp_path):
    write_csv(tmp_path / "firing.csv", ROWS)
    with (tmp_path / "firing.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["tensor"], line["time_step"]) for line in lines] == [
        (r.name, str(t)) for r in ROWS for t in (1, 2, 3)
    ]
    assert [float(line["rate"]) for line in lines] == [0.1, 0.2, 0.3, 0.0, 1.0, 0.25]
    assert lines[1] == {
        "tensor": "MS_SPS_lif",
        "paper_name": "SPS Conv1",
        "time_step": "2",
        "spikes": "2",
        "nonzero": "2",
        "elements": "10",
        "rate": "0.2",
        "nonzero_rate": "0.2",
    }


def test_table_shows_both_names_and_every_step():
    header, rows = rate_cells(ROWS)
    assert header == ["tensor (code)", "paper", "t=1", "t=2", "t=3", "mean"]
    assert rows[0] == ["MS_SPS_lif", "SPS Conv1", "0.1000", "0.2000", "0.3000", "0.2000"]
    assert rows[1] == ["head_lif", "head FC", "0.0000", "1.0000", "0.2500", "0.4167"]
    lines = terminal(header, rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["MS_SPS_lif", "SPS", "Conv1", *rows[0][2:]]


def test_bars_of_the_page_are_mean_rates_with_a_dot_for_each_step():
    found = rate_bars(ROWS)
    assert found.top == 1.0  # head_lif fires everywhere in its second step
    assert [(bar.name, bar.code, bar.value) for bar in found.bars] == [
        ("SPS Conv1", "MS_SPS_lif", "0.2000"),
        ("head FC", "head_lif", "0.4167"),
    ]
    assert [bar.percent for bar in found.bars] == pytest.approx([20, 500 / 12])
    assert [[mark.percent for mark in bar.marks] for bar in found.bars] == [
        pytest.approx([10, 20, 30]),
        pytest.approx([0, 100, 25]),
    ]
    assert len({mark.colour for mark in found.bars[0].marks}) == 3
    assert found.keys == [(f"t = {t + 1}", mark.colour) for t, mark in enumerate(found.bars[0].marks)]
