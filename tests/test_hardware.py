"""Presets of prices: those that are shipped, a file of one's own, and what is wrong with one."""

from __future__ import annotations

import pytest

from utils.errors import UserError
from utils.measure.energy import COSTS
from utils.measure.hardware import PRESETS, read_hardware

OWN = """
chip:
  source: measured
  mac_pj: 2
  ac_pj: 0.5
  bytes_per_value: 2
"""


def test_the_shipped_presets_have_sources_and_the_prices_of_the_library():
    for name, cost in COSTS.items():
        preset = read_hardware(name)
        assert preset.cost == cost
        assert "ISSCC 2014" in preset.source
    text = PRESETS.read_text()
    for cited in ("SzwU2XrXIS", "2210.13107", "ISSCC 2014"):
        assert cited in text
    int32 = read_hardware("int32").cost
    assert (int32.mac, int32.ac) == (3.2, 0.1)  # 3.1 for the product, 0.1 for the sum


def test_an_access_costs_the_line_through_the_published_accesses():
    # Lemaire et al. fit a line to 10, 20 and 100 pJ for 8 KiB, 32 KiB and 1 MiB; 32-bit words
    fp32 = read_hardware("fp32")
    for kib, published, off in ((8, 10, 4.0), (32, 20, 4.0), (1024, 100, 5.0)):
        assert fp32.access_pJ(kib * 1024 / 4) == pytest.approx(published, abs=off)
    assert fp32.access_pJ(1000, bits=8) == pytest.approx(13.2 + 1.09e-5 * 8000)
    assert fp32.access_pJ(1000, bits=64) == fp32.access_pJ(1000)  # no wider than a value of the preset


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text(OWN)
    chip = read_hardware("chip", str(path))
    assert (chip.cost.name, chip.cost.mac, chip.cost.ac, chip.cost.bytes_per_value) == ("chip", 2, 0.5, 2)
    assert (chip.memory_pj_per_byte, chip.sram_pj) == (None, None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("mac_pj: 2", "mac_pj: -2"), "mac_pj is -2; give a number above 0"),
        (("mac_pj: 2", "mac_pj: yes"), "mac_pj is 'yes'; give a number above 0"),
        (("mac_pj: 2", "mac_pj: true"), "mac_pj is True"),
        (("  mac_pj: 2\n", ""), "mac_pj missing; a preset needs mac_pj, ac_pj, bytes_per_value and a source"),
        (("  source: measured\n", ""), "source missing"),
        (("source: measured", "source: 5"), "source is 5; give text"),
        (("ac_pj", "acpj"), "acpj is no figure of a preset; valid: title, source, mac_pj"),
        (("chip:", "chip: 5\nother:"), "chip is 5; a preset holds figures"),
        (("chip:", "chips:"), "energy_cost chip is no preset of"),
        (("chip:", "- chip\n#"), ""),
    ],
)
def test_a_bad_file_says_what_is_wrong_and_where(tmp_path, change, expected):
    path = tmp_path / "own.yml"
    path.write_text(OWN.replace(*change))
    with pytest.raises(UserError) as caught:
        read_hardware("chip", str(path))
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message


def test_a_wrong_name_or_path_is_told(tmp_path):
    with pytest.raises(UserError, match=r"valid: fp32, fp16, int8, int32; did you mean fp32\?"):
        read_hardware("fp23")
    with pytest.raises(UserError, match="no such file"):
        read_hardware("fp32", str(tmp_path / "missing.yml"))
