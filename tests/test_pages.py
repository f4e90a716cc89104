"""The pages of firing_num.py: what they say, and that nothing of them is cut or hidden on a narrow or a wide screen."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest
from measuring import run
from PIL import Image

import firing_num
from utils.measure.models.price import MODELS
from utils.report.page import write_page

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "data" / "paper" / "table_s1_8_512.json"
LONG = "A title of <b>bold</b> & " + "long" * 40


@pytest.fixture(scope="module")
def rates_page(tmp_path_factory):
    """The page of the published rates, under a title that does not fit a line."""
    folder = tmp_path_factory.mktemp("rates")
    content = json.loads(TABLE.read_text()) | {"title": LONG}
    (folder / "table.json").write_text(json.dumps(content))
    assert firing_num.main(["--from-rates", str(folder / "table.json"), "--output", str(folder)]) == 0
    return folder / "table" / "report.html"


@pytest.mark.parametrize("of", ["a checkpoint", "rates"])
def test_a_page_needs_nothing_else(full, rates_page, of):
    page = (rates_page if of == "rates" else full[1] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|srcset|href)=["'](?!data:)|https?://|<script|@import|url\(""", page)
    assert "not measured power" in page
    assert "prefers-color-scheme: dark" in page
    tags = re.findall(r"<(/?)(section|div|table|tr|td|span|details|pre|p)\b", page)
    for tag in {tag for _, tag in tags}:
        assert tags.count(("", tag)) == tags.count(("/", tag)), tag


def text_of(page):
    """The text of a page as a reader sees it."""
    body = page.read_text(encoding="utf-8").partition("<body>")[2]
    return " ".join(html.unescape(re.sub("<.*?>", " ", body)).split())


def test_the_page_says_what_was_measured(full):
    report, folder = full
    page = text_of(folder / "report.html")
    assert f"top-1 accuracy {report['top1_percent']:.2f}% of 360 samples" in page
    for name in ("block 2 V_S", "head_lif", r"\begin{tabular}", "| model | T |"):
        assert name in page


def test_it_is_the_twin_that_needs_more(full):
    report, folder = full
    twin = report["ann_twin"]
    assert twin["ratio"] > 1
    pattern = rf"the ANN twin needs [\d.]+ .J {twin['ratio']:.1f} times the energy of this network, compute only"
    page = text_of(folder / "report.html")
    assert re.search(pattern, page)
    flat = next(one for one in report["energy_models"] if one["model"] == "flat")
    assert f"with memory {flat['ann_ratio']:.2f} times by model flat" in page


def test_the_sum_with_the_extras_is_a_figure_of_the_page(full):
    report, folder = full
    total = 1e3 * (report["energy"]["total_mJ"] + report["energy"]["extras_mJ"])
    assert total > 1
    assert f"energy with the extras {total:.4g} µJ neurons, memory" in text_of(folder / "report.html")


def test_a_total_that_lacks_an_operator_says_so(measured, tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr("utils.report.files.show", reports.append)
    run(measured, "incomplete")
    (report,) = reports
    energy = replace(report.measured.energy, incomplete=["aten.bmm in attn"])
    report.measured = replace(report.measured, energy=energy)
    write_page(tmp_path / "a.html", "report.html", title="a", subtitle="b", report=report)
    page = text_of(tmp_path / "a.html")
    assert re.search(r"energy per sample at least [\d.]+ .J INCOMPLETE, without aten.bmm in attn; compute only", page)
    assert "| INCOMPLETE, exact, first conv once |" in page
    (total,) = re.findall(r"exact once [\d.]+ . [\d.]+ . at least ([\d.]+ .J)", page)
    assert f"at least {total}" in dict(report.sections())["Totals per sample"]


def test_the_spread_between_samples_is_shown(full):
    report, folder = full
    spread = report["energy"]["per_sample"]
    page = text_of(folder / "report.html")
    assert f"most energy: sample {spread['worst_sample']} of" in page
    classes = next(table for table in tables_of(folder / "report.html") if table[0].startswith("class samples"))
    assert [row.split()[:2] for row in classes[1:]] == [
        [str(one["class"]), str(one["energy_pJ"]["samples"])] for one in spread["by_class"]
    ]


def test_units_and_powers_are_written_as_such(full, rates_page):
    for page in (full[1] / "report.html", rates_page):
        assert not re.search(r"\buJ\b|\^2", text_of(page))
    assert "2 N² D, as printed" in text_of(rates_page)


def test_the_page_of_published_rates(rates_page):
    page = text_of(rates_page)
    for figure in ("4.408 mJ", "published 4.50 mJ", "41.77 mJ 9.5 times", "39.43 mJ 8.9 times", "block 8 MLP layer 2"):
        assert figure in page
    readings, layers, rates = tables_of(rates_page)
    assert layers[-2].startswith("block.7.mlp.fc2_conv block 8 MLP layer 2 AC")
    assert [row.split()[-2:] for row in readings[1:3]] == [["4.457", "-1.0%"], ["4.408", "-2.0%"]]
    assert (len(layers), len(rates)) == (1 + 5 + 8 * 8 + 1 - 8, 1 + len(json.loads(TABLE.read_text())["tensors"]))


def test_text_is_text_and_no_markup(rates_page):
    assert LONG in text_of(rates_page)
    assert "<b>bold" not in rates_page.read_text(encoding="utf-8")


def tables_of(page):
    """The tables of a page: the text of each row, cells with a space between them."""
    content = html.unescape(page.read_text(encoding="utf-8"))
    return [
        [" ".join(re.sub("<.*?>", " ", row).split()) for row in re.findall("<tr>(.*?)</tr>", table)]
        for table in re.findall("<table.*?>(.*?)</table>", content, re.DOTALL)
    ]


def test_the_page_has_the_tables_of_the_terminal(measured, capsys):
    run(measured, "tables", "--sweep-T", "1")
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    tables = tables_of(measured / "out" / "tables" / "report.html")
    *numbers, _ = tables  # the last one says what was measured
    assert numbers.pop(3)[0].startswith("class samples")  # on the page alone
    layers, tensors = 5 + 2 * 7 + 1, 4 + 2 * 9 + 1
    assert [len(rows) - 1 for rows in numbers] == [3, len(MODELS), 2, layers, tensors, 1, 4]
    assert [row for rows in numbers for row in rows if row not in shown] == []


def test_how_each_part_ran_is_told(measured, capsys):
    _, found = run(measured, "parts", "--kernels", "plain")
    parts = [tuple(row.values()) for row in found["parts"]]
    assert ("MS_SSA_Conv", 2, "plain", "kernels: plain") in parts
    assert [name for name, _, runs_as, _ in parts if runs_as == "SpikingJelly's torch code"] == ["LIF"]
    assert "How each part ran" in capsys.readouterr().out
    shown = [row for rows in tables_of(measured / "out" / "parts" / "report.html") for row in rows]
    told = [" ".join(map(str, part)).strip() for part in parts]
    assert [part for part in told if part not in shown] == []


def pictures_of(page, dark):
    """The addresses of the pictures that a light or a dark page shows; they hold the pictures."""
    return re.findall(rf'{"srcset" if dark else "<img.*?src"}="(.*?)"', page.read_text(encoding="utf-8"))


def test_a_dark_page_has_pictures_without_white_paper(full):
    pairs = zip(*(pictures_of(full[1] / "report.html", dark) for dark in (True, False)), strict=True)
    pictures = [[Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))) for one in pair] for pair in pairs]
    assert len(pictures) == 2  # the twins by firing rate, attention maps
    for dark, light in pictures:
        assert dark.size == light.size
        assert dark.getpixel((0, 0))[3] == 0
        assert light.getpixel((0, 0)) == (255, 255, 255, 255)
        text = np.asarray(dark)[:, :18]  # left of all axes
        assert text[text[..., 3] > 200][:, :3].min() > 200


@pytest.mark.skipif(browser.find_browser() is None, reason="there is no Chromium to lay out the pages")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows(full, rates_page, tmp_path, dark):
    pages = [full[1] / "report.html", rates_page]
    found = browser.layouts(pages, (400, 1200), tmp_path, dark=dark)
    assert [(one["width"], one["dark"]) for one in found] == [(400, dark), (1200, dark)] * len(pages)
    assert [(one["page"], one["width"], one["overflowing"]) for one in found if one["overflowing"]] == []
    shown = [address[-40:] for address in pictures_of(pages[0], dark)]
    assert [one["pictures"] for one in found] == [shown] * 2 + [[]] * 2


@pytest.mark.skipif(browser.find_browser() is None, reason="there is no Chromium to lay out the pages")
def test_what_is_cut_or_too_wide_is_found(full, tmp_path):
    """The check above can fail: a copy of the page with names on one line, one with tables that cannot shrink."""
    page = (full[1] / "report.html").read_text(encoding="utf-8")
    for style in (".name { white-space: nowrap; overflow: hidden }", ".stack td { min-width: 400px }"):
        (tmp_path / "spoilt.html").write_text(page.replace("</style>", f"{style}</style>"), encoding="utf-8")
        (found,) = browser.layouts([tmp_path / "spoilt.html"], (400,), tmp_path, dark=False)
        assert found["overflowing"]
