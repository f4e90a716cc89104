"""The energy of a Spike-driven Transformer by the paper's formulas (table 1, supplement S1), from rates alone.

The published figure does not say which rate each conv is charged at; `READINGS` are the ways to read it. Rates are
keyed by the code's names of the spike tensors (`utils.measure.firing`), one value per time step.

Legend: D embed_dims, N tokens, T time steps. R-bar is the mean rate of the paper's Q_S, K_S, V_S; R-hat is the sum
of the rates of Q_S and K_S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from utils.errors import UserError, listed
from utils.measure.energy import COSTS, Cost, EnergyReport, EnergyRow
from utils.measure.firing import paper_name
from utils.measure.sdt.shape import SdtShape, layer_paper_name

Rates = Mapping[str, list[float]]

# How a 3x3 stride-2 max-pool raises the rate of stages 1 to 3, for tables that have only the rate before it. Ratios
# of rates measured on one trained network (.068 to .121, .053 to .166, .049 to .193): an estimate, and marked as one.
_POOL_GROWTH = (0.121 / 0.068, 0.166 / 0.053, 0.193 / 0.049)


@dataclass(frozen=True)
class Reading:
    """One way to read the published formula. A layer is charged at the rate of its own output or of what feeds it."""

    first: str  # first conv: once | own (T times its output's rate) | full (T times, rate 1)
    stages: str  # convs 2 to 4: own | feeding (the neuron before the pool) | pooled (estimated)
    position: str  # position conv: own (what enters block 1) | feeding (Conv4)
    qkv: str  # mean (R-bar) | entering

    @property
    def is_estimate(self) -> bool:
        return self.stages == "pooled"

    def cells(self) -> list[str]:
        """The reading in words: first conv, convs 2 to 4, position conv, q k v."""
        first = {"once": "once", "own": "T x own rate", "full": "T x, rate 1"}[self.first]
        stages = {"own": "own output", "feeding": "neuron before the pool", "pooled": "after the pool (estimated)"}
        position = {"own": "own output (block 1 input)", "feeding": "Conv4"}
        qkv = {"mean": "mean of Q_S, K_S, V_S", "entering": "what enters"}
        return [first, stages[self.stages], position[self.position], qkv[self.qkv]]


# The conventions of `paper` mode: S1 read as "each layer at the rate of its own neuron".
PAPER_READING = Reading("own", "own", "own", "mean")
READINGS = (
    Reading("once", "feeding", "own", "mean"),
    PAPER_READING,
    Reading("once", "own", "feeding", "mean"),
    Reading("own", "own", "feeding", "mean"),
    Reading("full", "feeding", "feeding", "mean"),
    Reading("once", "pooled", "feeding", "entering"),
    Reading("full", "pooled", "feeding", "entering"),
)


def rate_names(shape: SdtShape) -> list[str]:
    """The spike tensors whose rates the formulas need."""
    names = ["MS_SPS_lif", "MS_SPS_lif1", "MS_SPS_lif2", "MS_SPS_lif3"]
    for i in range(shape.depths):
        names += [f"MS_SSA_Conv{i}_{part}" for part in ("first_lif", "q_lif", "k_lif", "v_lif", "x_after_qkv")]
        names += [f"MS_MLP_Conv{i}_{part}" for part in ("fc1_lif", "fc2_lif")]
    return names + (["head_lif"] if shape.num_classes else [])


def check_rates(shape: SdtShape, rates: Rates, place: str) -> int:
    """The number of time steps; UserError where rates are missing, of unequal length or outside 0 to 1."""
    missing = [name for name in rate_names(shape) if name not in rates]
    if missing:
        known = listed([f"{name} ({paper_name(name)})" for name in missing], limit=3)
        raise UserError(f"{place}: no rates for {known}; a model of {shape.depths} blocks needs them")
    steps = {len(rates[name]) for name in rate_names(shape)}
    if len(steps) != 1 or 0 in steps:
        raise UserError(f"{place}: the tensors have rates for {sorted(steps)} time steps; give each the same number")
    for name in rate_names(shape):
        for value in rates[name]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"{place}: {name} has rate {value!r}; a firing rate lies in 0 to 1")
    return steps.pop()


def charged_rates(shape: SdtShape, rates: Rates, reading: Reading = PAPER_READING) -> dict[str, list[float]]:
    """The rate per step that each layer of `shape.macs()` is charged at; one entry only where it is charged once."""
    T = len(rates["MS_SPS_lif"])
    stages = [rates[name] for name in ("MS_SPS_lif", "MS_SPS_lif1", "MS_SPS_lif2", "MS_SPS_lif3")]
    block_input = rates["MS_SSA_Conv0_first_lif"]
    charged = {"patch_embed.proj_conv": {"once": [1.0], "own": stages[0], "full": [1.0] * T}[reading.first]}
    for i in (1, 2, 3):
        pooled = shape.pooling_stat[i - 1] == "1"
        growth = _POOL_GROWTH[i - 1] if reading.stages == "pooled" and pooled else 1.0
        source = stages[i] if reading.stages == "own" else stages[i - 1]
        charged[f"patch_embed.proj_conv{i}"] = [min(1.0, growth * rate) for rate in source]
    charged["patch_embed.rpe_conv"] = block_input if reading.position == "own" else stages[3]
    for b in range(shape.depths):
        q, k, v, entering, masked = (
            rates[f"MS_SSA_Conv{b}_{part}"] for part in ("q_lif", "k_lif", "v_lif", "first_lif", "x_after_qkv")
        )
        mean = [sum(step) / 3 for step in zip(q, k, v, strict=True)]
        for part in ("q", "k", "v"):
            charged[f"block.{b}.attn.{part}_conv"] = mean if reading.qkv == "mean" else entering
        charged[f"block.{b}.attn.kv_sum"] = [rate_k + rate_v for rate_k, rate_v in zip(k, v, strict=True)]
        charged[f"block.{b}.attn.proj_conv"] = masked
        charged[f"block.{b}.mlp.fc1_conv"] = rates[f"MS_MLP_Conv{b}_fc1_lif"]
        charged[f"block.{b}.mlp.fc2_conv"] = rates[f"MS_MLP_Conv{b}_fc2_lif"]
    if shape.num_classes:
        charged["head"] = rates["head_lif"]
    return charged


def paper_energy(
    shape: SdtShape, rates: Rates, reading: Reading = PAPER_READING, cost: Cost = COSTS["fp32"]
) -> EnergyReport:
    """Energy per sample by the published formulas.

    The q, k, v convs are charged at the rate of their *outputs* in the published reading, which is far below the
    rate of the spikes that enter them.
    """
    macs = shape.macs() | {f"block.{b}.attn.kv_sum": shape.tokens * shape.embed_dims for b in range(shape.depths)}
    rows = []
    for name, rate in charged_rates(shape, rates, reading).items():
        kind = "MAC" if name == "patch_embed.proj_conv" else "AC"
        operations = macs[name] * sum(rate)
        row = EnergyRow(
            name=name,
            paper_name=layer_paper_name(name),
            kind=kind,
            macs_per_step=macs[name],
            steps=len(rate),
            rate=rate,
            formula_operations=operations,
            operations=operations,
            energy_pJ=operations * cost.of(kind),
            charged="MACs x rate of supplement S1",
        )
        rows.append(row)
    return EnergyReport("paper", reading.cells()[0], cost, len(rates["MS_SPS_lif"]), rows)
