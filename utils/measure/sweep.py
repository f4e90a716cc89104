"""One checkpoint at several numbers of time steps: accuracy, firing rate, energy and latency of each.

Legend: T time steps, B batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from utils.measure.latency import median_latencies_ms, run_ms
from utils.measure.measurement import Measurement


@dataclass(frozen=True)
class SweepPoint:
    """One number of time steps."""

    time_steps: int
    top1_percent: float
    top5_percent: float
    mean_firing_rate: float | None  # None for a model without spike tensors
    energy_mJ: float
    mode: str
    first_conv: str
    latency_ms: float  # of one sample alone, without counting: median


def sweep(measurement: Measurement, time_steps: list[int]) -> list[SweepPoint]:
    """Evaluate at each T, all processes together. Static images are shown T times, events are cut into T frames."""
    measured = []
    for T in time_steps:
        with _time_steps(measurement, T):
            measured.append(measurement.evaluate(f"T = {T}"))
    points = []
    for T, found, ms in zip(time_steps, measured, _latencies_ms(measurement, time_steps), strict=True):
        top1, top5, energy = found.accuracy.top1, found.accuracy.top5, found.energy
        rate = found.mean_firing_rate
        points.append(SweepPoint(T, top1, top5, rate, energy.total_mJ, energy.mode, energy.first_conv, ms))
    return points


def why_no_sweep(measurement: Measurement, time_steps: list[int]) -> str:
    """Why the model cannot be run at each of `time_steps`; empty if it can. Found out on made-up samples.

    Raises:
        UserError: a number of time steps with which it fails.
    """
    for T in time_steps:
        with _time_steps(measurement, T):
            ran = measurement.rehearse().time_steps
        if ran != T:
            return f"asked for {T} time steps, the model ran {ran} (for images, its attribute T must set them)"
    return ""


@contextlib.contextmanager
def _time_steps(measurement: Measurement, T: int) -> Iterator[None]:
    """Let settings and model have T time steps for a while."""
    cfg, model = measurement.cfg, measurement.model
    shown = getattr(model, "T", None)
    measurement.cfg = replace(cfg, time_steps=T)
    if shown is not None:
        model.T = T  # type: ignore[assignment]
    try:
        yield
    finally:
        measurement.cfg = cfg
        if shown is not None:
            model.T = shown


def _latencies_ms(measurement: Measurement, time_steps: list[int]) -> list[float]:
    def at(T: int) -> Callable[[], float]:
        with _time_steps(measurement, T):
            x, _ = measurement.first_batch(1)

        def run() -> float:
            with _time_steps(measurement, T):
                return run_ms(measurement.model, x, measurement.precision)

        return run

    return median_latencies_ms([at(T) for T in time_steps])
