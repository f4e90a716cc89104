"""From counted operations to energy: what each layer of a spiking network costs per sample, in picojoules.

This is arithmetic on operation counts, compute only. It is not measured power: memory traffic, clocking and leakage
are outside of it. For any network of Conv, Linear and spiking neurons:

    from utils.measure.energy import measure_energy
    report = measure_energy(model, batches)
    print(report.total_mJ, report.rows)

Costs per operation: 45 nm CMOS (Horowitz, ISSCC 2014), the figures of the paper's supplement S1.
Legend: T time steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from utils.errors import listed
from utils.measure.spike_values import SUM_CONVENTION, Values
from utils.measure.spread import PerSample
from utils.measure.synapse_counts import Counts, LayerCount
from utils.measure.synapses import SynapseRecorder, reset_neurons

PJ_PER_MJ = 1e9
DISCLAIMER = "compute only, not measured power"


@dataclass(frozen=True)
class Cost:
    """Energy of one operation in pJ: `mac` multiplies and adds, `ac` only adds."""

    name: str
    mac: float
    ac: float
    bytes_per_value: int = 4

    def of(self, kind: str) -> float:
        return self.mac if kind == "MAC" else self.ac

    def __str__(self) -> str:
        return f"{self.name} (MAC {self.mac:g} pJ, AC {self.ac:g} pJ)"


COSTS = {
    "fp32": Cost("45 nm fp32", 4.6, 0.9, 4),
    "fp16": Cost("45 nm fp16", 1.5, 0.4, 2),
    "int8": Cost("45 nm int8", 0.23, 0.03, 1),
}


@dataclass(frozen=True)
class EnergyRow:
    """One layer (or extra) and what it is charged, per sample."""

    name: str
    kind: str  # MAC, AC; of an extra: what it is counted in
    operations: float  # charged
    energy_pJ: float
    charged: str  # how the operations were counted, in words
    convention: str = ""  # what one operation is: of spikes of 0 and 1, of other spikes, or of real values
    paper_name: str = ""
    type: str = ""
    macs_per_step: int = 0
    steps: int = 0
    rate: list[float] = field(default_factory=list)  # per step: what enters, or in `paper` mode what is charged
    formula_operations: float | None = None  # MACs x rate, over all steps
    exact_operations: float | None = None  # operations really needed, over all steps

    @property
    def mean_rate(self) -> float:
        return sum(self.rate) / len(self.rate) if self.rate else 0.0


@dataclass(frozen=True)
class EnergyReport:
    """What one sample costs, by layer."""

    mode: str
    first_conv: str
    cost: Cost
    time_steps: int
    rows: list[EnergyRow]
    extras: list[EnergyRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)  # what multiplies and has no price, so that the total lacks it
    per_sample: PerSample | None = None  # None where the shapes do not tell the samples
    other_first_conv_mJ: float | None = None  # the total, had the first conv been treated the other way
    form: str = ""  # of a model that has several

    @property
    def total_pJ(self) -> float:
        """Without the extras."""
        return sum(row.energy_pJ for row in self.rows)

    @property
    def total_mJ(self) -> float:
        return self.total_pJ / PJ_PER_MJ

    @property
    def extras_mJ(self) -> float:
        return sum(row.energy_pJ for row in self.extras) / PJ_PER_MJ

    @property
    def other_first_conv(self) -> str:
        """The treatment of the first conv that `other_first_conv_mJ` is the total of."""
        return "per_step" if self.first_conv == "once" else "once"

    @property
    def with_form(self) -> str:
        """Form and time steps to begin a line with, for a model that has several forms; else empty."""
        return f"{self.form}, T = {self.time_steps}, " if self.form else ""

    def operations(self, kind: str) -> float:
        """Charged operations of one kind, `MAC` or `AC`."""
        return sum(row.operations for row in self.rows if row.kind == kind)

    @property
    def accounting(self) -> str:
        """Mode, first conv and costs, in one line: part of every total that is printed."""
        missing = f"INCOMPLETE, without {listed(self.incomplete)}; " if self.incomplete else ""
        return f"{missing}{self.with_form}mode {self.mode}, first conv {self.first_conv}, {self.cost}, {DISCLAIMER}"


def measure_energy(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    mode: str = "exact",
    first_conv: str = "per_step",
    cost: Cost = COSTS["fp32"],
    reset: bool = True,
) -> EnergyReport:
    """The energy of `model` per sample, averaged over `batches`, counted while it evaluates them.

    Args:
        model: any module with spiking neurons; it is called as `model(batch)` in evaluation mode.
        batches: inputs, the samples along their first dimension or, time first, along their second.
        mode: `exact` charges the operations that are needed, `formula` MACs x firing rate of the input.
        first_conv: `per_step`, or `once` for a static image, which is the same at every step.
        reset: reset SpikingJelly's neurons before each batch and at the end, so that no sample starts with the
            membrane potential of another one. False: the model does that, or the batches are one long sequence.

    Raises:
        ValueError: an unknown mode or treatment, no batch, or batches with different numbers of time steps.
    """
    training = model.training
    model.eval()
    try:
        with SynapseRecorder(model, exact=mode == "exact") as recorder, torch.no_grad():
            for batch in batches:
                if reset:
                    reset_neurons(model)
                model(batch)
        if reset:
            reset_neurons(model)
    finally:
        model.train(training)
    return account(recorder.counts(), mode=mode, first_conv=first_conv, cost=cost)


def account(
    counts: Counts,
    *,
    mode: str = "exact",
    first_conv: str = "per_step",
    cost: Cost = COSTS["fp32"],
    sum_rates: Mapping[str, list[float]] | None = None,
    sum_formula: str = "elements x rate",
    labels: Tensor | None = None,
    name_of: Callable[[str], str] = lambda name: "",
) -> EnergyReport:
    """Charge what a recorder counted.

    Args:
        mode, first_conv, cost: as in `measure_energy`.
        sum_rates: `formula` only, for each weightless sum the rate per step that the formula charges for it;
            by default the rate of what is summed.
        sum_formula: what those rates are, in words.
        labels: the class of each sample, for the spread by class.
        name_of: a paper's name of a layer.

    Raises:
        ValueError: an unknown mode or treatment, or `exact` without exact counts.
    """
    if mode not in ("exact", "formula"):
        raise ValueError(f"mode={mode!r} is not one of exact, formula (paper needs a model of a known family)")
    if first_conv not in ("per_step", "once"):
        raise ValueError(f"first_conv={first_conv!r} is not one of per_step, once")
    exact = mode == "exact"
    words = ("operations needed", "additions needed") if exact else ("MACs x entering rate", sum_formula)
    rates = {name: rate for name, rate in (sum_rates or {}).items() if rate}
    rows = [_row(layer, mode, cost, layer.spike_rate, words[0]) for layer in counts.layers]
    rows += [_row(one, mode, cost, rates.get(one.name, one.rate), words[1]) for one in counts.sums]
    rows = [replace(row, paper_name=name_of(row.name)) for row in rows]
    total = sum(row.energy_pJ for row in rows)
    once = _charged_once(rows[0], counts.layers[0], mode, cost) if counts.layers else None
    other = None
    if once is not None:
        alternative = total - rows[0].energy_pJ + once.energy_pJ
        other = (total if first_conv == "once" else alternative) / PJ_PER_MJ
        rows[0] = once if first_conv == "once" else rows[0]
    rows.sort(key=lambda row: counts.order.index(row.name))
    notes = _notes(counts, rows)
    report = EnergyReport(mode, first_conv, cost, counts.time_steps, rows, [], notes, counts.unpriced)
    return replace(report, other_first_conv_mJ=other, per_sample=_per_sample(counts, report, labels))


def _row(layer: LayerCount, mode: str, cost: Cost, rate: list[float], charged: str) -> EnergyRow:
    """One layer. `rate` and `charged`: what the mode charges, per step and in words."""
    kind = "MAC" if layer.values.kind == "real" else "AC"
    formula = layer.macs_per_step * sum(rate)
    exact = None if layer.synops is None else sum(layer.synops) / layer.samples
    if mode == "exact" and exact is None:
        raise ValueError("mode='exact' needs a recorder that counted exactly (exact=True)")
    operations = formula if mode == "formula" or exact is None else exact
    return EnergyRow(
        name=layer.name,
        type=layer.type,
        kind=kind,
        macs_per_step=layer.macs_per_step,
        steps=layer.steps,
        rate=layer.rate,
        formula_operations=formula,
        exact_operations=exact,
        operations=operations,
        energy_pJ=operations * cost.of(kind),
        charged=charged,
        convention=SUM_CONVENTION if layer.type == "sum" and kind == "AC" else layer.values.convention,
    )


def charged_once(counts: Counts) -> bool:
    """Whether `first_conv="once"` charges the first layer for its first step only."""
    return bool(counts.layers) and _steps_are_equal(counts.layers[0])


def _steps_are_equal(layer: LayerCount) -> bool:
    """Whether one step of a first layer can stand for the others: it takes real values, the same in each."""
    return layer.values.kind == "real" and layer.steps > 1 and len(set(layer.nonzero)) == 1


def _charged_once(row: EnergyRow, layer: LayerCount, mode: str, cost: Cost) -> EnergyRow | None:
    """The first layer charged for its first step only; None if it takes spikes, runs once anyway, or if its steps
    differ, so that none can stand for the others."""
    if not _steps_are_equal(layer):
        return None
    if mode == "exact" and layer.synops is not None:
        operations = layer.synops[0] / layer.samples
    else:
        operations = layer.macs_per_step * layer.rate[0]
    charged = f"{row.charged}, once of {row.steps} equal steps"
    return replace(row, operations=operations, energy_pJ=operations * cost.mac, charged=charged)


def _per_sample(counts: Counts, report: EnergyReport, labels: Tensor | None) -> PerSample | None:
    """The spread between samples of what `exact` charges; None in another mode, which charges mean rates, and where
    the shapes do not tell the samples."""
    if report.mode != "exact" or counts.by_sample is None:
        return None
    operations = counts.by_sample.double()  # [rows, samples], rows in the order of the report
    rows = report.rows
    needed = torch.tensor([row.exact_operations or 1.0 for row in rows], dtype=torch.float64)
    charged = torch.tensor([row.operations for row in rows], dtype=torch.float64) / needed  # below 1: charged once
    price = torch.tensor([report.cost.of(row.kind) for row in rows], dtype=torch.float64)
    return PerSample.of(charged @ operations, (charged * price) @ operations, labels)


def _notes(counts: Counts, rows: list[EnergyRow]) -> list[str]:
    notes = []
    if counts.never_called:
        notes.append(f"no part of the forward pass, so not charged: {listed(counts.never_called)}")
    if counts.unpriced:
        notes.append(f"INCOMPLETE: these operators multiply and have no price here: {listed(counts.unpriced)}")
    first = counts.layers[0].name if counts.layers else ""
    late = [row.name for row in rows if row.kind == "MAC" and row.name != first]
    if late:
        notes.append(f"not spike-driven, charged as MAC (real values enter): {listed(late)}")
    graded: dict[str, list[str]] = {}
    for row in rows:
        if row.kind == "AC" and row.convention not in (SUM_CONVENTION, Values().convention):
            graded.setdefault(row.convention, []).append(row.name)
    return notes + [f"charged as AC, {convention}: {listed(names)}" for convention, names in graded.items()]
