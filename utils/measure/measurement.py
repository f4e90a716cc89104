"""Evaluate a checkpoint once, with everything counted that firing_num.py reports: accuracy, spikes, operations."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.data.datasets import dataset_facts, resolve_data
from utils.data.facts import DataSettings
from utils.data.loaders import build_eval_loader
from utils.errors import UserError
from utils.measure.energy import COSTS, Cost, EnergyReport, account
from utils.measure.energy_extras import extra_rows
from utils.measure.firing import FiringRecorder, FiringRow
from utils.measure.sdt.ann_twin import AnnTwin, AttentionComparison, ann_twin, compare_attention
from utils.measure.sdt.paper_energy import PAPER_READING, paper_energy
from utils.measure.sdt.shape import SdtShape
from utils.measure.synapse_counts import Counts
from utils.measure.synapses import SynapseRecorder
from utils.run.build import build_model, check_neurons
from utils.run.checkpoint import load_weights
from utils.run.console import Progress
from utils.run.distributed import Process
from utils.run.evaluation import EvalResult, evaluate
from utils.run.precision import Precision

if TYPE_CHECKING:
    from utils.config.settings import Config


@dataclass(frozen=True)
class Measured:
    """One evaluation: how accurate, what fired, what it cost in the chosen accounting and in the others."""

    accuracy: EvalResult
    firing: list[FiringRow]
    counts: Counts
    energy: EnergyReport
    others: list[EnergyReport]  # the other accounting modes, from the same counts
    shape: SdtShape
    twin: AnnTwin
    attention: AttentionComparison

    @property
    def mean_firing_rate(self) -> float:
        """Spikes over elements of all spike tensors together."""
        spikes = sum(sum(row.spikes) for row in self.firing)
        return spikes / sum(row.elements_per_step * len(row.spikes) for row in self.firing)


class Measurement:
    """A checkpoint, its model on the device, and the evaluation data.

    The script must have imported `model`, which registers the names.

    Raises:
        UserError: settings, data or checkpoint that do not fit.
    """

    def __init__(self, cfg: Config, process: Process) -> None:
        if cfg.first_conv == "once" and dataset_facts(cfg.dataset).events:
            raise UserError(
                f"first_conv: 'once' does not fit the events of {cfg.dataset}, which differ at every step; "
                "use per_step or auto"
            )
        self.cfg = cfg
        self.process = process
        self.model = build_model(cfg)
        self.precision = Precision(cfg, process.device)
        proof = [torch.float64] if cfg.verify else []  # see utils.measure.verify
        check_neurons(self.model, process.device, self.precision.activation_dtype, *proof)
        self.checkpoint = load_weights(self.model, cfg.resume, use_ema=cfg.use_ema)
        self.model.to(process.device)
        if cfg.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.data: DataSettings = resolve_data(cfg)
        shape = SdtShape.of(self.model, *self.data.eval_size[1:])
        assert shape is not None  # every model of the registry has these sizes
        self.shape = shape
        self.cost = chosen_cost(cfg)

    def evaluate(self, title: str = "evaluating") -> Measured:
        """Evaluate every sample once, all processes together."""
        cfg, process, model = self.cfg, self.process, self.model
        loader = build_eval_loader(cfg, device=process.device, rank=process.rank, world_size=process.world_size)
        images = cfg.val_batch_size * process.world_size
        firing = FiringRecorder(model.spike_sources())  # type: ignore[operator]
        synapses = SynapseRecorder(model, exact=cfg.energy_mode == "exact", sums=attention_sums(model))
        with (
            Progress(title, len(loader), images, cfg.log_interval, process.is_main) as progress,
            firing,
            synapses,
        ):
            accuracy = evaluate(model, loader, self.precision, process, on_step=progress.step)
        return self._account(accuracy, firing.rows(process), synapses.counts(process))

    def _account(self, accuracy: EvalResult, firing: list[FiringRow], counts: Counts) -> Measured:
        check_layers(self.shape, counts)
        rates = {row.name: row.rate for row in firing}
        modes = ["exact", "formula", "paper"] if self.cfg.energy_mode == "exact" else ["formula", "paper"]
        reports = {mode: self._energy(mode, counts, rates) for mode in modes}
        chosen = reports.pop(self.cfg.energy_mode)
        extras = extra_rows(
            self.cfg.energy_extras or [],
            counts,
            self.cost,
            shape=self.shape,
            memory_pJ_per_byte=self.cfg.memory_pj,
        )
        chosen = replace(chosen, extras=extras)
        convention = self.cfg.ann_attention
        return Measured(
            accuracy=accuracy,
            firing=firing,
            counts=counts,
            energy=chosen,
            others=list(reports.values()),
            shape=self.shape,
            twin=ann_twin(self.shape, chosen, convention),
            attention=compare_attention(self.shape, chosen, convention),
        )

    def _energy(self, mode: str, counts: Counts, rates: dict[str, list[float]]) -> EnergyReport:
        first_conv = self.cfg.first_conv
        if mode == "paper":
            reading = replace(PAPER_READING, first="once") if first_conv == "once" else PAPER_READING
            return paper_energy(self.shape, rates, reading, self.cost)
        if first_conv == "auto":
            first_conv = "per_step" if dataset_facts(self.cfg.dataset).events else "once"
        sums = {
            f"block.{b}.attn.kv_sum": [
                k + v for k, v in zip(rates[f"MS_SSA_Conv{b}_k_lif"], rates[f"MS_SSA_Conv{b}_v_lif"], strict=True)
            ]
            for b in range(self.shape.depths)
        }
        return account(counts, mode=mode, first_conv=first_conv, cost=self.cost, sum_rates=sums)

    def first_batch(self, samples: int) -> tuple[Tensor, Tensor]:
        """The first `samples` evaluation samples and their labels, on the device."""
        cfg = replace(self.cfg, val_batch_size=samples, workers=0)
        images, labels = next(iter(build_eval_loader(cfg, device=self.process.device)))
        return images, labels


def attention_sums(model: nn.Module) -> dict[str, nn.Module]:
    """For each block of a model of the registry, the module whose output self-attention sums over tokens.

    That sum has no weights, so no Conv or Linear layer shows it: the product of the spikes, after the event-mode pool.
    """
    return {
        f"{name.removesuffix('.kv_pool')}.kv_sum": module
        for name, module in model.named_modules()
        if name.endswith(".kv_pool")
    }


def check_layers(shape: SdtShape, counts: Counts) -> None:
    """The counted layers must be those that the model's sizes ask for; a faster path that avoids them would lie.

    Raises:
        RuntimeError: a layer is missing or has another number of operations.
    """
    expected = shape.macs()
    counted = {layer.name: layer.macs_per_step for layer in counts.layers}
    wrong = [
        f"{name}: {counted.get(name, 'not seen')} instead of {expected.get(name, 'none')}"
        for name in expected | counted
        if expected.get(name) != counted.get(name)
    ]
    if wrong or len(counts.sums) != shape.depths:
        raise RuntimeError(
            f"the forward pass ran other layers than the model's sizes say, so there is no honest total "
            f"({'; '.join(wrong[:5])}); measure without paths that replace layers"
        )


def chosen_cost(cfg: Config) -> Cost:
    """The preset, or the user's own prices."""
    preset = COSTS[cfg.energy_cost]
    if cfg.mac_pj is None and cfg.ac_pj is None:
        return preset
    return Cost("own costs", cfg.mac_pj or preset.mac, cfg.ac_pj or preset.ac, preset.bytes_per_value)


def checkpoint_facts(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """Which file was measured."""
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    epoch = content.get("epoch")
    return {"path": path, "sha256": digest, "epoch": epoch if isinstance(epoch, int) else None}
