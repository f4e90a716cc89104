"""How long one sample takes from the device to its logits, without counting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from utils.run.precision import Precision

_ROUNDS = (7, 51)  # at least, and at most
_BUDGET = 3.0  # seconds for rounds beyond the least number


def median_latencies_ms(runs: Sequence[Callable[[], float]]) -> list[float]:
    """The median of several calls of each run, which returns its milliseconds.

    The runs take turns, so that a machine that slows down for a while slows all of them.
    """
    found: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()  # the first call also fills caches
    started = time.perf_counter()
    for done in range(_ROUNDS[1]):
        if done >= _ROUNDS[0] and time.perf_counter() - started > _BUDGET:
            break
        for run, times in zip(runs, found, strict=True):
            times.append(run())
    return [statistics.median(times) for times in found]


@torch.no_grad()
def run_ms(model: nn.Module, x: Tensor, precision: Precision) -> float:
    """Milliseconds of one evaluation of `x`."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    started = time.perf_counter()
    with precision.autocast():
        model(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return 1e3 * (time.perf_counter() - started)
