"""Why the sparse convolutions are C called through ctypes: the same loop in numba, the same C called through cffi.

    pip install numba cffi   # into a throw-away environment beside the project's requirements
    python -m benchmarks.sparse_alternatives

One layer, 1x1, 512 -> 512 channels, 64 images of 8 x 8, firing rate 0.2, one thread: bits in, sums of the weight rows
of the active inputs out. Processor time, so that others on the machine do not count; candidates take turns, ratios
are taken within a round. Compiling is not timed.

ctypes         module/kernels/csrc/sparse as the engine calls it
cffi           the same library through cffi (ABI mode)
numba rows     per pixel, whole weight rows of 512 floats are added up
numba panels   the engine's order: active channels listed once per block, then 32 outputs at a time
"""

from __future__ import annotations

import argparse
import ctypes
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Call, Spread, Timings, noting_failure, print_json, print_table, speedup
from module.sparse.library import CONVOLVE, NONE, Layer, Outcome, load
from module.sparse.ops import pack_spikes, pack_weight

try:
    import cffi  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import numba  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ModuleNotFoundError as missing:
    WITHOUT: str | None = missing.name
else:
    WITHOUT = None

CHANNELS, PIXELS, RATE = 512, 64 * 8 * 8, 0.2
PANEL, BLOCK = 32, 512  # as in module/kernels/csrc/sparse
CALLS = 20_000  # to time one call of next to no work
# The position of the only set bit of a word: numba has no instruction for it.
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
POSITION = np.zeros(64, np.int64)
for _bit in range(64):
    POSITION[(int(DE_BRUIJN) << _bit) % 2**64 >> 58] = _bit
DECLARATIONS = """
int64_t sparse_run(void *layers, int64_t n, void *memory, void *done, int threads);
void sparse_unpack(void *bits, int64_t P, int64_t C, void *out, int threads);
"""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By numba at its first call."""
    return function if WITHOUT else numba.njit(fastmath=True)(function)  # type: ignore[no-any-return, unused-ignore]


@compiled
def active(words: np.ndarray, channels: np.ndarray) -> int:
    """Lists the set bits of `words`; returns how many there are."""
    n = 0
    for w in range(words.shape[0]):
        left = words[w]
        while left:
            lowest = left & (~left + np.uint64(1))
            channels[n] = 64 * w + POSITION[(lowest * DE_BRUIJN) >> np.uint64(58)]
            n += 1
            left &= left - np.uint64(1)
    return n


@compiled
def add_rows(weights: np.ndarray, channels: np.ndarray, n: int, row: np.ndarray) -> None:
    """`row` = the sum of n rows of `weights`, four at a time: the running sums are in memory, not in registers."""
    row[:] = 0
    i = 0
    while i + 4 <= n:
        a, b, c, d = (
            weights[channels[i]],
            weights[channels[i + 1]],
            weights[channels[i + 2]],
            weights[channels[i + 3]],
        )
        for o in range(row.shape[0]):
            row[o] += (a[o] + b[o]) + (c[o] + d[o])
        i += 4
    while i < n:
        a = weights[channels[i]]
        for o in range(row.shape[0]):
            row[o] += a[o]
        i += 1


@compiled
def numba_rows(bits: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """bits [P, words], weights [C, O] -> out [P, O]."""
    channels = np.empty(weights.shape[0], np.int64)
    for p in range(bits.shape[0]):
        add_rows(weights, channels, active(bits[p], channels), out[p])


@compiled
def numba_panels(bits: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """bits [P, words], weights [O / PANEL, C, PANEL] -> out [P, O]."""
    channels = np.empty((BLOCK, weights.shape[1]), np.int64)
    lengths = np.empty(BLOCK, np.int64)
    for first in range(0, bits.shape[0], BLOCK):
        count = min(BLOCK, bits.shape[0] - first)
        for p in range(count):
            lengths[p] = active(bits[first + p], channels[p])
        for panel in range(weights.shape[0]):
            for p in range(count):
                row = out[first + p, panel * PANEL : (panel + 1) * PANEL]
                add_rows(weights[panel], channels[p], lengths[p], row)


def candidates() -> tuple[dict[str, Call], dict[str, Call]]:
    """The layer by each candidate, all checked to compute the same; and calls of next to no work."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(PIXELS, CHANNELS, 1, 1, generator=generator) < RATE).float()
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1, generator=generator)
    bits, _ = pack_spikes(x)
    packed, out = pack_weight(weight), torch.empty(PIXELS, CHANNELS)
    one = Layer(kind=CONVOLVE, taps=1, results=1, T=1, N=PIXELS, H=1, W=1, C=CHANNELS, O=CHANNELS)
    one.input, one.source, one.spikes = bits.data_ptr(), NONE, int(x.sum())
    one.to[0].weights, one.to[0].values = packed.data_ptr(), out.data_ptr()
    one.to[0].residual = one.to[0].spikes = NONE
    layers, done = (Layer * 1)(one), (Outcome * 1)()

    library = load()
    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS)
    by_cffi = ffi.dlopen(library._name)

    def address(array: Any) -> object:
        return ffi.cast("void *", ctypes.addressof(array))

    words, rows = bits.numpy().view(np.uint64), np.ascontiguousarray(weight[:, :, 0, 0].T.numpy())
    panels = packed.numpy().reshape(-1, CHANNELS, PANEL)
    layer: dict[str, Call] = {
        "ctypes": lambda: library.sparse_run(layers, 1, None, done, 1),
        "cffi": lambda: by_cffi.sparse_run(address(layers), 1, ffi.NULL, address(done), 1),
        "numba rows": lambda: numba_rows(words, rows, out.numpy()),
        "numba panels": lambda: numba_panels(words, panels, out.numpy()),
    }
    expected = x[:, :, 0, 0].double() @ weight[:, :, 0, 0].T.double()
    for name, call in layer.items():
        out.fill_(torch.nan)
        call()
        error = float((out - expected).abs().max() / expected.abs().max())
        assert error < 1e-5, f"{name}: {error}"
    empty: dict[str, Call] = {
        "ctypes": lambda: library.sparse_unpack(layers, 0, 1, layers, 1),
        "cffi": lambda: by_cffi.sparse_unpack(address(layers), 0, 1, address(layers), 1),
    }
    return layer, empty


def processor_time(calls: dict[str, Call], rounds: int, repeats: int) -> Timings:
    """Seconds of the processor per call by round, in another order each: a neighbour leaves its data in the cache."""
    names, seconds = list(calls), Timings(list(calls))
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            with noting_failure(seconds.failed, name):
                started = time.process_time()
                for _ in range(repeats):
                    calls[name]()
                seconds[name].append((time.process_time() - started) / repeats)
    for name in seconds.failed:
        del seconds[name]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    if WITHOUT:
        parser.error(f"{WITHOUT} is not installed: pip install numba cffi")
    torch.set_num_threads(1)
    layer, empty = candidates()
    times, calls = processor_time(layer, rounds, 1), processor_time(empty, 5, CALLS)
    ratios = {name: speedup(times, name, "ctypes") for name in times}  # above 1: slower than through ctypes
    milliseconds = {name: Spread.of([1e3 * value for value in values]) for name, values in times.items()}
    print_table(
        ("candidate", "ms", "of the time through ctypes"),
        [(name, str(milliseconds[name]), str(ratios[name])) for name in times],
        times.failed,
    )
    microseconds = {name: Spread.of([1e6 * value for value in values]) for name, values in calls.items()}
    for name, spread in microseconds.items():
        print(f"one call of next to no work through {name}: {spread} microseconds")
    print_json(
        "benchmarks.sparse_alternatives",
        {
            "milliseconds": {name: vars(spread) for name, spread in milliseconds.items()},
            "ratio": {name: vars(spread) for name, spread in ratios.items()},
            "call_microseconds": {name: vars(spread) for name, spread in microseconds.items()},
            "libraries": {"numba": numba.__version__, "cffi": cffi.__version__},
        },
        failed=times.failed | calls.failed,
    )


if __name__ == "__main__":
    main()
