"""Energy from published rates: the readings of the published figure, and what is wrong with a file of rates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from golden import table_s1

from utils.errors import UserError
from utils.measure.energy import COSTS
from utils.measure.sdt.paper_energy import PAPER_READING, READINGS, Reading, paper_energy
from utils.measure.sdt.rates_file import read_rates
from utils.report.rates import RatesReport

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "data" / "paper" / "table_s1_8_512.json"


@pytest.fixture(scope="module")
def table():
    return RatesReport(str(TABLE), COSTS["fp32"])


def test_the_shipped_table_is_the_published_one(table):
    assert table.file.rates == {name: row["rate_per_step"] for name, row in table_s1().items()}
    assert table.file.time_steps == 4


@pytest.mark.parametrize(
    ("reading", "energy"),
    [
        (Reading("once", "feeding", "own", "mean"), 4.457),
        (PAPER_READING, 4.408),
        (Reading("once", "own", "feeding", "mean"), 4.331),
        (Reading("own", "own", "feeding", "mean"), 4.107),
        (Reading("full", "feeding", "feeding", "mean"), 5.352),
    ],
)
def test_readings_of_the_published_figure(table, reading, energy):
    assert reading in READINGS
    assert not reading.is_estimate
    report = paper_energy(table.file.shape, table.file.rates, reading)
    assert report.total_mJ == pytest.approx(energy, abs=5e-4)


def test_at_entering_rates_attention_saves_far_less(table):
    text = dict(table.sections())
    (twin,) = (value for title, value in text.items() if title.startswith("ANN twin"))
    assert "41.77 mJ (published 41.77)" in twin
    assert "39.43 mJ" in twin
    assert "35.0 times" in twin
    assert "really enters q, k, v, and f as printed: self-attention 4.1 times" in twin
    (readings,) = (value for title, value in text.items() if title.startswith("Readings"))
    for figure in ("4.408", "4.457", "5.352", "published: 4.50 mJ"):
        assert figure in readings
    assert readings.count("~") == 3  # two estimates and what the sign means


def test_the_mode_stands_beside_the_total(table):
    titles = [title for title, _ in table.sections()]
    assert any("mode paper" in title and "not measured power" in title for title in titles)


def test_other_costs_scale_the_energy(table):
    cheap = RatesReport(str(TABLE), COSTS["int8"])
    assert cheap.chosen.total_mJ < table.chosen.total_mJ / 10
    assert "int8" in cheap.chosen.accounting


@pytest.fixture
def spoilt(tmp_path):
    """Write a copy of the shipped table, changed, and return the message it ends in."""

    def spoil(change):
        content = json.loads(TABLE.read_text())
        change(content)
        path = tmp_path / "rates.json"
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            read_rates(str(path))
        assert str(path) in str(caught.value)
        return str(caught.value)

    return spoil


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("model"), "model: field required"),
        (lambda c: c["model"].update(embed_dim=512), "'embed_dim' is unknown; valid: depths, embed_dims"),
        (lambda c: c["model"].update(depths=0), "model: depths is 0: it should be greater than or equal to 1"),
        (lambda c: c["model"].update(depths=True), "depths is True: it should be a valid integer"),
        (lambda c: c["model"].update(depths=8.5), "depths is 8.5: it should be a valid integer"),
        (lambda c: c["model"].update(depths=10**9), "depths is 1000000000: it should be less than or equal to 1000"),
        (lambda c: c["model"].update(height=1e300), "height is 1e+300"),
        (lambda c: c["model"].update(width=math.inf), "width is inf"),
        (lambda c: c["model"].update(mlp_ratio=math.nan), "mlp_ratio is nan"),
        (lambda c: c["model"].update(embed_dims=None), "embed_dims is None"),
        (lambda c: c["model"].update(pooling_stat=1111), "pooling_stat is 1111: it should be a valid string"),
        (lambda c: c["model"].update(pooling_stat="11111"), "pooling_stat is '11111'"),
        (lambda c: c["model"].update(depths=9), "no rates for MS_SSA_Conv8_first_lif (block 9 input)"),
        (lambda c: c["tensors"][0].update(rate=[0.1, 0.2]), "time steps"),
        (lambda c: c["tensors"][0].update(rate=[0.1, 0.2, 0.3, 1.5]), "MS_SPS_lif has rate 1.5"),
        (lambda c: c["tensors"][0].update(rate=[0.1, 0.2, 0.3, "x"]), "tensors.0.rate.3 is 'x'"),
        (lambda c: c["tensors"][0].update(rate=[0.1, 0.2, 0.3, math.nan]), "tensors.0.rate.3 is nan"),
        (lambda c: c["tensors"][0].update(rate=[0.1, 0.2, 0.3, True]), "tensors.0.rate.3 is True"),
        (lambda c: c["tensors"][0].update(rate=0.1), "tensors.0.rate is 0.1: it should be a valid list"),
        (lambda c: c["tensors"].append({"rate": [1]}), "name: field required"),
        (lambda c: c["tensors"].append(c["tensors"][0]), "is a second 'MS_SPS_lif'; give each tensor once"),
        (lambda c: c.update(tensors={}), "tensors is {}: it should be a valid list"),
        (lambda c: c.update(published={"spiking_mJ": "4.5"}), "published.spiking_mJ is '4.5'"),
        (lambda c: c.update(published={"spiking_mJ": 0}), "published.spiking_mJ is 0"),
        (lambda c: c.update(published=True), "published is True"),
        (lambda c: c.update(title=[1]), "title is [1]"),
    ],
)
def test_a_bad_file_says_what_is_wrong(spoilt, change, expected):
    assert expected in spoilt(change)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a.json").write_text("rates")
    (tmp_path / "b.json").write_text('{"model": ' + "[" * 100_000)
    (tmp_path / "c.json").write_text('{"model": {"depths": 8, "depths": 9}, "tensors": []}')
    (tmp_path / "d.json").write_text('{"model": {"depths": ' + "9" * 5000 + "}}")
    (tmp_path / "e.json").write_text('{"title": "\\udcff", "model": {}, "tensors": []}')
    for path, expected in (
        ("missing.json", "no such file"),
        ("e.json", "no JSON"),
        ("a.json", "no JSON"),
        ("b.json", "no JSON"),
        ("c.json", "'depths' is there twice"),
        ("d.json", "no JSON"),
        (".", "no regular file"),
    ):
        with pytest.raises(UserError, match=expected):
            read_rates(str(tmp_path / path))
