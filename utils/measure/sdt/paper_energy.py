"""The energy of a Spike-driven Transformer by the paper's formulas (table 1, supplement S1), from rates alone.

The published figure does not say which rate each conv is charged at; `READINGS` are the ways to read it. Rates are
keyed by the code's names of the spike tensors (`utils.measure.sdt.names`), one value per time step.

Legend: D channels, N tokens, T time steps. R-bar is the mean rate of the paper's Q_S, K_S, V_S; R-hat is the sum
of the rates of Q_S and K_S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from utils.errors import UserError, listed
from utils.measure.energy import COSTS, Cost, EnergyReport, EnergyRow
from utils.measure.sdt import names
from utils.measure.sdt.names import QKV, STAGE_LAYERS, STAGE_TENSORS, layer, paper_name, tensor
from utils.measure.sdt.shape import SdtShape

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
    parts = (names.BLOCK_INPUT, *QKV.values(), *names.ENTERED_BY.values())
    blocks = [tensor(block, part) for block in range(shape.depths) for part in parts]
    return [*STAGE_TENSORS, *blocks, *([names.HEAD_TENSOR] if shape.num_classes else [])]


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


def token_sum_rate(block: int, rates: Rates) -> list[float]:
    """R-hat of a block, per step."""
    _, k, v = (rates[tensor(block, part)] for part in QKV.values())
    return [rate_k + rate_v for rate_k, rate_v in zip(k, v, strict=True)]


def charged_rates(shape: SdtShape, rates: Rates, reading: Reading = PAPER_READING) -> dict[str, list[float]]:
    """The rate per step that each layer of `shape.macs()` is charged at; one entry only where it is charged once."""
    stages = [rates[name] for name in STAGE_TENSORS]
    charged = {STAGE_LAYERS[0]: {"once": [1.0], "own": stages[0], "full": [1.0] * len(stages[0])}[reading.first]}
    for i in (1, 2, 3):
        growth = _POOL_GROWTH[i - 1] if reading.stages == "pooled" and shape.pools(i - 1) else 1.0
        source = stages[i] if reading.stages == "own" else stages[i - 1]
        charged[STAGE_LAYERS[i]] = [min(1.0, growth * rate) for rate in source]
    charged[names.POSITION_LAYER] = rates[tensor(0, names.BLOCK_INPUT)] if reading.position == "own" else stages[3]
    for block in range(shape.depths):
        outputs = [rates[tensor(block, part)] for part in QKV.values()]
        mean = [sum(step) / 3 for step in zip(*outputs, strict=True)]
        for part in QKV:
            charged[layer(block, part)] = mean if reading.qkv == "mean" else rates[tensor(block, names.BLOCK_INPUT)]
        charged[layer(block, names.TOKEN_SUM)] = token_sum_rate(block, rates)
        for part, entering in names.ENTERED_BY.items():
            charged[layer(block, part)] = rates[tensor(block, entering)]
    if shape.num_classes:
        charged[names.HEAD_LAYER] = rates[names.HEAD_TENSOR]
    return charged


def paper_energy(
    shape: SdtShape, rates: Rates, reading: Reading = PAPER_READING, cost: Cost = COSTS["fp32"]
) -> EnergyReport:
    """Energy per sample by the published formulas.

    The q, k, v convs are charged at the rate of their *outputs* in the published reading, which is far below the
    rate of the spikes that enter them.
    """
    macs = shape.macs() | {
        layer(block, names.TOKEN_SUM): shape.tokens * shape.channels for block in range(shape.depths)
    }
    rows = []
    for name, rate in charged_rates(shape, rates, reading).items():
        kind, formula, charged = "AC", macs[name] * sum(rate), "MACs x rate of supplement S1"
        if name == STAGE_LAYERS[0]:
            kind = "MAC"
        row = EnergyRow(name, kind, formula, formula * cost.of(kind), charged, paper_name=paper_name(name))
        rows.append(replace(row, formula_operations=formula, macs_per_step=macs[name], steps=len(rate), rate=rate))
    return EnergyReport("paper", reading.cells()[0], cost, len(rates[STAGE_TENSORS[0]]), rows)
