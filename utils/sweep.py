"""One checkpoint at several numbers of time steps: accuracy, firing rate, energy and latency of each.

Legend: T time steps, B batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from utils.dataset_facts import dataset_facts
from utils.measurement import Measured, Measurement
from utils.precision import Precision

_REPEATS = 7


@dataclass(frozen=True)
class SweepPoint:
    """One number of time steps."""

    time_steps: int
    top1_percent: float
    top5_percent: float
    mean_firing_rate: float
    energy_mJ: float
    mode: str
    first_conv: str
    latency_ms: float  # of one sample alone, without counting: median


def sweep(measurement: Measurement, time_steps: list[int]) -> list[SweepPoint]:
    """Evaluate at each T, all processes together. Static images are shown T times, events are cut into T frames."""
    points = []
    trained = measurement.cfg
    model = measurement.model
    shown = model.T
    try:
        for T in time_steps:
            measurement.cfg = replace(trained, time_steps=T)
            if not dataset_facts(trained.dataset).events:
                model.T = T  # type: ignore[assignment]
            measured = measurement.evaluate(f"T = {T}")
            points.append(_point(T, measured, latency_ms(measurement)))
    finally:
        measurement.cfg = trained
        model.T = shown
    return points


def _point(T: int, measured: Measured, latency: float) -> SweepPoint:
    return SweepPoint(
        time_steps=T,
        top1_percent=measured.accuracy.top1,
        top5_percent=measured.accuracy.top5,
        mean_firing_rate=measured.mean_firing_rate,
        energy_mJ=measured.energy.total_mJ,
        mode=measured.energy.mode,
        first_conv=measured.energy.first_conv,
        latency_ms=latency,
    )


def latency_ms(measurement: Measurement) -> float:
    """Milliseconds from one sample on the device to its logits; the median of several runs."""
    x, _ = measurement.first_batch(1)
    precision = Precision(measurement.cfg, measurement.process.device)
    _run(measurement.model, x, precision)  # the first call pays for caches and kernels
    return statistics.median(_run(measurement.model, x, precision) for _ in range(_REPEATS))


@torch.no_grad()
def _run(model: nn.Module, x: Tensor, precision: Precision) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    started = time.perf_counter()
    with precision.autocast():
        model(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return 1e3 * (time.perf_counter() - started)
