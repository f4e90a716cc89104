"""The firing rate above which a dense convolution is faster than a sparse one, on this machine.

Measured once per kind of layer with random spikes, and kept in the cache folder. The time of the sparse one is
close to a + b * rate as long as it adds from lists, so two rates give the line; the result is the rate at which it
equals the dense time. Above, it adds from tables, in a time that does not depend on the rate: where that is less than
the dense time, the sparse one is used at any rate.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from module.kernels.native import cache_folder
from module.sparse.library import load

# In force where a measurement must not decide: a run that is to be repeated bit for bit. Measured crossovers of
# the layers of a 2-512 model lie around it.
FIXED = 0.5
_RATES = (0.1, 0.3, 0.6)  # two with lists, one with tables
_MAX_PIXELS = 2048
_ROUNDS = 4


def crossover(C: int, M: int, kernel: int, pixels: int) -> float:
    """The firing rate, 0 to 1, up to which the sparse layer is used."""
    if torch.are_deterministic_algorithms_enabled():
        return FIXED
    # Pixels by powers of two: a last, smaller batch is no new kind of layer.
    bucket = min(_MAX_PIXELS, 1 << max(0, pixels - 1).bit_length())
    return _kept(C, M, kernel, bucket, torch.get_num_threads())


@functools.cache
def _kept(C: int, M: int, kernel: int, pixels: int, threads: int) -> float:
    key = f"{C}x{M}x{kernel} pixels={pixels} threads={threads} torch={torch.__version__}"
    file = cache_folder() / f"crossover_{Path(load()._name).stem}.json"
    known = _read(file)
    if key not in known:
        value = _measure(C, M, kernel, pixels)
        known = _read(file) | {key: value}
        _write(file, known)
    return known[key]


def _read(file: Path) -> dict[str, float]:
    try:
        return {str(k): float(v) for k, v in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # not there yet, or spoiled: measured anew


def _write(file: Path, known: dict[str, float]) -> None:
    # Nothing depends on the file: without it the next process measures again.
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
        json.dump(known, new, indent=1)
        new.close()
        os.replace(new.name, file)


def _measure(C: int, M: int, kernel: int, pixels: int) -> float:
    from module.sparse.ops import sparse_conv2d

    side = max(1, min(8, int(pixels**0.5)))
    shape = (max(1, pixels // side**2), C, side, side)
    generator = torch.Generator().manual_seed(0)  # not the global one: a measurement must not change a run
    weight = torch.rand((M, C, kernel, kernel), generator=generator) - 0.5
    weight = weight.contiguous(memory_format=torch.channels_last)

    def spikes(rate: float) -> torch.Tensor:
        x = (torch.rand(shape, generator=generator) < rate).float()
        return x.contiguous(memory_format=torch.channels_last)

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        few, more, many = (spikes(rate) for rate in _RATES)
        calls: list[Callable[[], object]] = [
            lambda: F.conv2d(few, weight, padding=kernel // 2),
            lambda: sparse_conv2d(few, weight, auto=False),
            lambda: sparse_conv2d(more, weight, auto=False),
            lambda: sparse_conv2d(many, weight, auto=False),
        ]
        times: list[list[float]] = [[], [], [], []]
        for turn in range(_ROUNDS + 1):
            for call, values in zip(calls, times, strict=True):
                started = time.perf_counter()
                call()
                if turn:  # the first round warms up
                    values.append(time.perf_counter() - started)
    # The least disturbed run of each: others may use the machine.
    dense, at_few, at_more, at_many = (min(values) for values in times)
    if dense >= at_many:
        return 1.0
    slope = max(at_more - at_few, 1e-9) / (_RATES[1] - _RATES[0])
    return min(1.0, max(0.0, _RATES[0] + (dense - at_few) / slope))
