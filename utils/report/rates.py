"""The report of firing_num.py --from-rates: the published figure beside the possible readings of its formula."""

from __future__ import annotations

from typing import Any, NamedTuple

from utils.measure.energy import DISCLAIMER, Cost
from utils.measure.family import paper_name, published_rates
from utils.report import tables
from utils.report.report import SCHEMA, energy_dict, energy_text

_CONVENTIONS = ("printed", "paper")  # how f(Q, K, V) of the ANN twin is counted


class TensorRates(NamedTuple):
    """A spike tensor of a file of rates."""

    name: str
    paper_name: str
    rate: list[float]  # per time step
    mean_interval: None = None  # samples are not known

    @property
    def mean_rate(self) -> float:
        return sum(self.rate) / len(self.rate)


class RatesReport:
    """The report of one file of firing rates.

    Raises:
        UserError: the file is missing, no JSON, or sizes or rates in it are missing or impossible.
    """

    def __init__(self, path: str, cost: Cost) -> None:
        self._charged = published_rates(path, cost)
        self.file, self.chosen = self._charged.file, self._charged.chosen
        self.twins = {convention: self._charged.compare(convention) for convention in _CONVENTIONS}
        self.tensors = [TensorRates(name, paper_name(name), rate) for name, rate in self.file.rates.items()]

    def sections(self) -> list[tuple[str, str]]:
        """Title and text of each section, for the terminal."""
        charged = self._charged
        readings = [tables.terminal(*self.reading_cells(), left=4), *self.reading_lines()]
        return [
            ("Firing rates from", f"{self.file.title}\n{self.file.source}"),
            (f"Energy per layer ({self.chosen.accounting})", energy_text(self.chosen)),
            (f"Readings of the published formula ({charged.cost}, {DISCLAIMER})", "\n".join(readings)),
            (
                f"ANN twin ({tables.count(charged.layer_macs)} MACs in Conv and Linear layers)",
                "\n".join(self.twin_lines()),
            ),
        ]

    def reading_cells(self) -> tables.Cells:
        """Each reading of the formula with its energy, beside the published one where the file has that."""
        published = self.file.published.get("spiking_mJ")
        header = ["first conv", "convs 2 to 4", "position conv", "q, k, v", "mJ"]
        header += ["to published"] if published else []
        rows = []
        for reading, report in self._charged.readings:
            about = "~" if reading.is_estimate else ""
            cells = [*reading.cells(), f"{about}{report.total_mJ:.3f}"]
            rows.append(cells + ([f"{report.total_mJ / published - 1:+.1%}"] if published else []))
        return header, rows

    def reading_lines(self) -> list[str]:
        """What is to be said below the readings."""
        published = self.file.published.get("spiking_mJ")
        lines = [f"published: {published:.2f} mJ. No reading gives it exactly."] if published else []
        return [*lines, "~ estimated: rates after the max-pools are not published, see docs/energy.md"]

    def twin_lines(self) -> list[str]:
        """The ANN twin by each way to count its attention."""
        published = self.file.published.get("ann_mJ")
        beside = f" (published {published:.2f})" if published else ""
        lines = [
            f"f(Q, K, V) = {twin.formula}: {twin.energy_mJ:.2f} mJ{beside}, {tables.ratio(twin.ratio, 2)} the spiking "
            f"network; self-attention alone {tables.energy(twin.attention_pJ)} against "
            f"{tables.energy(twin.spiking_attention_pJ)} per block, {tables.ratio(twin.attention_ratio)} as much"
            for twin in self.twins.values()
        ]
        _, entering = self._charged.readings[-1]
        ratio = tables.ratio(self._charged.compare("printed", entering).attention_ratio)
        return [*lines, f"at the rates of what really enters q, k, v, and f as printed: self-attention {ratio} as much"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "title": self.file.title,
            "source": self.file.source,
            "published": self.file.published,
            "time_steps": self.file.time_steps,
            "model": self.file.shape.as_dict(),
            "tensors": [{"name": name, "rate": rate} for name, rate in self.file.rates.items()],
            "energy": energy_dict(self.chosen),
            "readings": [
                dict(
                    zip(("first_conv", "convs_2_to_4", "position_conv", "qkv"), reading.cells(), strict=True),
                    energy_mJ=report.total_mJ,
                    estimate=reading.is_estimate,
                )
                for reading, report in self._charged.readings
            ],
            "ann_twin": {
                convention: {"energy_mJ": twin.energy_mJ, "self_attention_pJ_per_block": twin.attention_pJ}
                for convention, twin in self.twins.items()
            },
        }
