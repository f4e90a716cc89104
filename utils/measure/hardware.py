"""Prices of operations and memory accesses: the presets of data/hardware.yml, or of a file of one's own.

A preset names its source; docs/energy.md says what each figure is used for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils import ROOT
from utils.config.yaml_file import Entry, read_yaml
from utils.errors import UserError, did_you_mean
from utils.measure.energy import Cost

PRESETS = ROOT / "data" / "hardware.yml"
_REQUIRED = ("mac_pj", "ac_pj", "bytes_per_value")
_OPTIONAL = ("memory_pj_per_byte", "sram_pj", "sram_pj_per_bit", "fifo_words")
_TEXTS = ("title", "source")


@dataclass(frozen=True)
class Hardware:
    """One preset. Figures of memories may be missing (None)."""

    name: str
    source: str
    cost: Cost
    memory_pj_per_byte: float | None = None
    sram_pj: float | None = None
    sram_pj_per_bit: float | None = None
    fifo_words: float | None = None

    def product_pJ(self, bits: int | None = None) -> float:
        """A product and its addition, with an activation of `bits` bits (None: of the width of a value).

        With b bits it is at most b additions of the shifted weight (bit-serial multiplication), which needs no price
        that no source gives.
        """
        return self.cost.mac if bits is None else min(self.cost.mac, bits * self.cost.ac)

    def bytes_of(self, bits: int | None = None) -> float:
        """Bytes of an activation of `bits` bits (None: of the width of a value)."""
        wide = self.cost.bytes_per_value
        return wide if bits is None else min(wide, bits / 8)

    def access_pJ(self, words: float, bits: int | None = None) -> float:
        """Reading or writing one word of an SRAM of `words` words, each of `bits` bits (None: of a value's width)."""
        assert self.sram_pj is not None
        assert self.sram_pj_per_bit is not None
        return self.sram_pj + self.sram_pj_per_bit * 8 * self.bytes_of(bits) * words


def read_hardware(name: str, path: str = "") -> Hardware:
    """The preset `name` of the file `path`, by default of `PRESETS`.

    Raises:
        UserError: the file cannot be read, has no such preset, or a preset has a missing, unknown or impossible figure.
    """
    entries = read_yaml(path or str(PRESETS))
    presets = {entry.key: entry for entry in entries}
    if name not in presets:
        valid = ", ".join(presets) or "none"
        remedy = did_you_mean(name, presets) or "; give one with energy_cost"
        raise UserError(f"energy_cost {name} is no preset of {path or PRESETS}; valid: {valid}{remedy}")
    checked = {entry.key: _preset(entry) for entry in entries}  # all of them: a slip in one is told at once
    return checked[name]


def _preset(entry: Entry) -> Hardware:
    place, figures = f"{entry.place}: {entry.key}", entry.value
    if not isinstance(figures, Mapping):
        raise UserError(f"{place} is {figures!r}; a preset holds figures, as mac_pj: 4.6 (see {PRESETS})")
    known = (*_TEXTS, *_REQUIRED, *_OPTIONAL)
    for key, value in figures.items():
        if key not in known:
            raise UserError(f"{place}: {key} is no figure of a preset; valid: {', '.join(known)}{_close(key, known)}")
        if key in _TEXTS:
            if not isinstance(value, str) or not value:
                raise UserError(f"{place}: {key} is {value!r}; give text")
        elif not _is_positive(value):
            raise UserError(f"{place}: {key} is {value!r}; give a number above 0")
    if missing := [key for key in (*_REQUIRED, "source") if key not in figures]:
        raise UserError(f"{place}: {', '.join(missing)} missing; a preset needs {', '.join(_REQUIRED)} and a source")
    title = figures.get("title", entry.key)
    cost = Cost(title, figures["mac_pj"], figures["ac_pj"], figures["bytes_per_value"])
    return Hardware(entry.key, figures["source"], cost, **{key: figures.get(key) for key in _OPTIONAL})


def _close(key: Any, known: tuple[str, ...]) -> str:
    return did_you_mean(str(key), known)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
