"""Evaluate a checkpoint once, with everything counted that firing_num.py reports: accuracy, spikes, operations."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.config.settings import Config
from utils.data.datasets import dataset_facts, resolve_data
from utils.data.facts import DataSettings
from utils.data.loaders import build_eval_loader
from utils.errors import UserError, listed
from utils.measure.energy import Cost, EnergyReport, account
from utils.measure.energy_extras import extra_rows
from utils.measure.family import Comparison, Family, family_of
from utils.measure.firing import FiringRecorder, FiringRow, spike_sources
from utils.measure.hardware import Hardware, read_hardware
from utils.measure.models.totals import ModelTotal, model_totals
from utils.measure.models.workload import workload
from utils.measure.neurobench import NeuroBench, NeuroBenchRecorder, Static, membrane_updates
from utils.measure.synapse_counts import Counts
from utils.measure.synapses import SynapseRecorder, named_modules
from utils.measure.totals import interleaved
from utils.run.build import build_model, layout_of, make_faster, set_layout
from utils.run.checkpoint import load_weights, read_checkpoint, trained_with
from utils.run.console import Progress
from utils.run.contract import check_contract
from utils.run.distributed import Process
from utils.run.evaluation import EvalResult, evaluate
from utils.run.memory import refuse_evaluation_that_does_not_fit
from utils.run.precision import Precision

_REHEARSED = 2  # made-up samples that are measured before the evaluation
_UPDATE_SAMPLES = 8  # that changes of membrane potentials are counted on


@dataclass(frozen=True)
class Measured:
    """One evaluation: how accurate, what fired, what it cost in the chosen accounting and in the others."""

    accuracy: EvalResult
    firing: list[FiringRow]
    counts: Counts
    energy: EnergyReport
    others: list[EnergyReport]  # the other accounting modes, from the same counts
    models: list[ModelTotal]  # energy with memory and state too, of the network and its twins
    neurobench: NeuroBench
    family: Family | None
    convention: str  # how the attention of the ANN twin is counted
    notes: list[str]  # what is left out and why, and what else a reader must know

    @property
    def mean_firing_rate(self) -> float | None:
        """Values that are not 0 over elements of all spike tensors together; None where there is no such tensor."""
        return mean_rate(self.firing)

    def compare(self, report: EnergyReport) -> Comparison | None:
        """The ANN twin beside one of the accounting modes; None without a family."""
        return self.family.compare(report, self.convention) if self.family else None


def mean_rate(firing: list[FiringRow]) -> float | None:
    """Values that are not 0 over elements of all these tensors together; None if there is no tensor."""
    elements = sum(row.elements_per_step * len(row.nonzero) for row in firing)
    return sum(sum(row.nonzero) for row in firing) / elements if elements else None


class Measurement:
    """A checkpoint, its model on the device, and the evaluation data.

    The script must have imported `model`, which registers the names.

    Raises:
        UserError: settings, data or checkpoint that do not fit, or a model whose operations cannot be counted.
    """

    def __init__(self, cfg: Config, process: Process) -> None:
        self.events = dataset_facts(cfg.dataset).events
        if cfg.first_conv == "once" and self.events:
            raise UserError(
                f"first_conv: 'once' does not fit the events of {cfg.dataset}, which differ at every step; "
                "use per_step or auto"
            )
        self.hardware = chosen_hardware(cfg)
        self.cost = self.hardware.cost
        self.notes: list[str] = []
        content = read_checkpoint(cfg.resume)
        self.cfg = cfg = self._as_in_file(cfg, content)
        self.process = process
        refuse_evaluation_that_does_not_fit(cfg, process.device, _REHEARSED)
        self.model = build_model(cfg)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.precision = Precision(cfg, process.device)
        self.checkpoint = load_weights(self.model, cfg.resume, use_ema=cfg.use_ema, content=content)
        self._choose_form()
        self.model.to(process.device)
        check_contract(cfg, self.model, process.device)
        self.static = Static.of(self.model)
        make_faster(cfg, self.model, process, self.precision, training=False)
        set_layout(cfg, self.model, process.device)
        innermost, _ = layout_of(cfg, self.model, process.device)
        self.cfg = cfg = replace(cfg, channels_last=innermost)  # images have the layout of the weights
        self.data: DataSettings = resolve_data(cfg)
        self.mode = cfg.energy_mode
        self.extras = list(cfg.energy_extras or [])
        self.sources = spike_sources(self.model)
        self.family = family_of(self.model, *self.data.eval_size[1:])
        if self.family is None:
            self._leave_out_family("it is of no known family")
        elif self.mode == "paper" and not self.family.paper_mode:
            raise UserError(
                f"energy_mode: paper is not there for {cfg.model}: {self.family.why_no_paper}; use exact or formula"
            )
        self.rehearse()

    def _as_in_file(self, cfg: Config, content: Mapping[str, Any]) -> Config:
        """`cfg` with the second head that the weights have, and with their time steps where none are given."""
        trained = trained_with(content, cfg.resume)
        if "time_steps" not in cfg.explicit:
            cfg = replace(cfg, time_steps=trained.time_steps or cfg.time_steps)
        elif trained.time_steps not in (None, cfg.time_steps):
            self.notes.append(
                f"time_steps: measured at T = {cfg.time_steps}, the checkpoint was trained at T = {trained.time_steps}"
            )
        return replace(cfg, kd="hard" if trained.second_head else "none")  # which kind has no effect here

    def _choose_form(self) -> None:
        """Merge the model where that is asked for; in evaluation it computes the same."""
        form = self.cfg.form
        if form == "merged" and not hasattr(self.model, "fuse"):
            raise UserError(f"form: model {self.cfg.model} has no fuse() that would merge it; leave form out")
        if form == "merged" or (form == "auto" and getattr(self.model, "has_merged_form", False)):
            self.model.eval().fuse()  # type: ignore[operator]

    def _leave_out_family(self, why: str) -> None:
        self.family = None
        parts = ["the paper's names and energy mode", "the comparison with an ANN"]
        if self.mode == "paper":
            self.mode = "formula"
            parts[0] += " (energy_mode is now formula)"
        if "residual" in self.extras:
            self.extras.remove("residual")
            parts.append("the extra 'residual'")
        self.notes.append(f"left out for this model, since {why}: {', '.join(parts)}")

    def rehearse(self) -> Counts:
        """Measure two made-up samples, so that what cannot be measured is found before the evaluation, not after it.

        Raises:
            UserError: operations cannot be counted.
        """
        device = self.process.device
        steps = [self.cfg.time_steps] if self.events else []
        shape = (_REHEARSED, *steps, *self.data.eval_size)  # [B, C, H, W] or [B, T, C, H, W]
        x = torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)
        try:
            found = self._count([(x, torch.zeros(_REHEARSED, dtype=torch.long, device=device))], Process(0, 1, device))
            _, rows, counts, *_ = found
            if counts.samples != _REHEARSED:
                raise ValueError(f"{_REHEARSED} samples enter it, {counts.samples} seem to pass through its neurons")
            if self.family and (why := self.family.why_not(counts, {row.name: row.rate for row in rows})):
                self._leave_out_family(why)
            self._account(*found)
        except ValueError as error:
            raise UserError(f"model: {self.cfg.model} cannot be measured: {error}") from error
        return counts

    def evaluate(self, title: str = "evaluating") -> Measured:
        """Evaluate every sample once, all processes together."""
        cfg, process = self.cfg, self.process
        loader = build_eval_loader(cfg, device=process.device, rank=process.rank, world_size=process.world_size)
        at_once = min(cfg.val_batch_size, max(1, loader.samples // process.world_size))
        refuse_evaluation_that_does_not_fit(cfg, process.device, at_once)
        images = cfg.val_batch_size * process.world_size
        with Progress(title, len(loader), images, cfg.log_interval, process.is_main) as progress:
            return self._account(*self._count(loader, process, progress.step, self._membrane_updates()))

    def measure(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Measured:
        """Measure these samples and labels, on the device, in this process alone."""
        return self._account(*self._count(batches, Process(0, 1, self.process.device)))

    def _count(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        process: Process,
        on_step: Callable[[int], None] | None = None,
        updates: tuple[float | None, int] = (None, 0),
    ) -> tuple[EvalResult, list[FiringRow], Counts, NeuroBench, Tensor]:
        firing = FiringRecorder(self.sources, self.model)
        sums = self.family.sums if self.family else {}
        synapses = SynapseRecorder(self.model, exact=self.mode == "exact", sums=sums, timed=self.sources)
        neurobench = NeuroBenchRecorder(self.model, self.sources)
        labels: list[Tensor] = []
        with firing, synapses, neurobench:
            accuracy = evaluate(self.model, _noting_labels(loader, labels), self.precision, process, on_step=on_step)
        rows, counts = firing.rows(process, self._name_of), synapses.counts(process)
        metrics = neurobench.result(self.static, counts, rows, process, updates)
        classes = interleaved([torch.cat(part) for part in process.gather_objects(labels) if part])
        return accuracy, rows, counts, metrics, classes

    def _name_of(self, name: str) -> str:
        return self.family.paper_name(name) if self.family else ""

    def _membrane_updates(self) -> tuple[float | None, int]:
        """Per sample, and the number of samples: the neurons run once more for it, so a few stand for all."""
        x, _ = self.first_batch(min(_UPDATE_SAMPLES, self.cfg.val_batch_size))
        with self.precision.autocast():
            return membrane_updates(self.model, x), len(x)

    def _account(
        self,
        accuracy: EvalResult,
        firing: list[FiringRow],
        counts: Counts,
        neurobench: NeuroBench,
        labels: Tensor,
    ) -> Measured:
        rates = {row.name: row.rate for row in firing}
        modes = ("exact", "formula") if self.mode == "exact" else ("formula",)
        reports = {mode: self._energy(mode, counts, rates, labels) for mode in modes}
        residual = None
        if self.family:
            if (paper := self.family.paper_energy(rates, self.cfg.first_conv == "once", self.cost)) is not None:
                reports["paper"] = paper
            reports = {mode: replace(report, form=self.family.form) for mode, report in reports.items()}
            residual = self.family.shape.residual_additions_per_step()
        extras = extra_rows(
            self.extras,
            counts,
            self.cost,
            residual_additions=residual,
            memory_pJ_per_byte=self.hardware.memory_pj_per_byte or 0.0,
            first_conv=reports[self.mode].first_conv,
        )
        models, left_out = self._models(reports[modes[0]], counts, firing, neurobench.spikes)
        return Measured(
            accuracy=accuracy,
            firing=firing,
            counts=counts,
            energy=replace(reports.pop(self.mode), extras=extras),
            others=list(reports.values()),
            models=models,
            neurobench=neurobench,
            family=self.family,
            convention=self.cfg.ann_attention,
            notes=[
                *self.notes,
                *self._firing_notes(firing),
                *self._accuracy_notes(accuracy),
                *left_out,
                *(self.family.notes(rates) if self.family else ()),
            ],
        )

    def _energy(self, mode: str, counts: Counts, rates: dict[str, list[float]], labels: Tensor) -> EnergyReport:
        first_conv = self.cfg.first_conv
        if first_conv == "auto":
            first_conv = "per_step" if self.events else "once"
        sums: dict[str, Any] = dict(labels=labels)
        if self.family:
            sums |= dict(sum_rates=self.family.sum_rates(rates), sum_formula=self.family.sum_formula)
        return account(counts, mode=mode, first_conv=first_conv, cost=self.cost, name_of=self._name_of, **sums)

    def _accuracy_notes(self, accuracy: EvalResult) -> list[str]:
        trained = trained_with(self.checkpoint, self.cfg.resume)
        if not (trained.published and trained.second_head) or accuracy.top1 > 5 * 100 / self.cfg.num_classes:
            return []
        return [
            "the accuracy is near chance. In the authors' code before 2024-03-25, the first head was fed the averaged "
            "membrane values and only the second one (head_kd) the spikes; a file of that time does not fit "
            "today's form, in which both are fed the spikes"
        ]

    def _models(
        self, report: EnergyReport, counts: Counts, firing: list[FiringRow], spikes: Mapping[str, float]
    ) -> tuple[list[ModelTotal], list[str]]:
        work = workload(report, counts, named_modules(self.model), spikes)
        products = self.family.twin_products(self.cfg.ann_attention) if self.family else None
        return model_totals(self.cfg.energy_model, work, products, self.hardware, mean_rate(firing))

    def _firing_notes(self, firing: list[FiringRow]) -> list[str]:
        notes = []
        if not self.sources:
            notes.append("left out: firing rates, since the model has no spike_sources() and no SpikingJelly neuron")
        if graded := [row.name for row in firing if not row.is_binary]:
            notes.append(
                f"not spikes of 0 and 1: {listed(graded)}; their rates count every value that is not 0, and what they "
                "cost in the layers that they enter is noted below the table of layers"
            )
        if idle := [name for name in self.sources if name not in {row.name for row in firing}]:
            notes.append(f"never computed, so without a firing rate: {listed(idle)}")
        return notes

    def first_batch(self, samples: int) -> tuple[Tensor, Tensor]:
        """The first `samples` evaluation samples and their labels, on the device."""
        cfg = replace(self.cfg, val_batch_size=samples, workers=0)
        images, labels = next(iter(build_eval_loader(cfg, device=self.process.device)))
        return images, labels


def _noting_labels(loader: Iterable[tuple[Tensor, Tensor]], labels: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `loader`; `labels` gets the labels of each."""
    for x, y in loader:
        labels.append(y.cpu())
        yield x, y


def chosen_hardware(cfg: Config) -> Hardware:
    """The preset, with the user's own prices in it.

    Raises:
        UserError: there is no such preset, or its file is not as it should be.
    """
    preset = read_hardware(cfg.energy_cost, cfg.hardware)
    if cfg.memory_pj is not None:
        preset = replace(preset, memory_pj_per_byte=cfg.memory_pj)
    if cfg.mac_pj is None and cfg.ac_pj is None:
        return preset
    known = preset.cost
    own = Cost("own costs", cfg.mac_pj or known.mac, cfg.ac_pj or known.ac, known.bytes_per_value)
    return replace(preset, cost=own)


def checkpoint_facts(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """Which file was measured; of a model folder, its weights."""
    weights = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    epoch = content.get("epoch")
    return {"path": path, "sha256": digest, "epoch": epoch if isinstance(epoch, int) else None}
