"""How every benchmark here measures: A and B interleaved in one process, medians with spread, one JSON line.

A clock that drifts (heat, other users of the machine) then hits all candidates alike, and a ratio is taken within
each round, so it is steadier than the quotient of two medians measured at different times. Memory is measured in
child processes, one per candidate, because the peak of a process never falls.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from utils.run.allocator import return_freed_memory
from utils.run.reproduce import git_commit, versions

MIB = 2.0**20
Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` values."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError without values."""
        if not values:
            raise ValueError("nothing was measured")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def synchronize(device: torch.device) -> None:
    """Wait for queued work; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def noting_failure(failed: dict[str, str], name: str) -> Iterator[None]:
    """Whatever is raised inside becomes the entry `name` of `failed`: one candidate that fails must not end a
    benchmark. A ValueError says what is wrong; the traceback of any other exception is printed as well."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        failed[name] = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        if not isinstance(error, ValueError):
            traceback.print_exc()


def on_first_call(make: Callable[[], Call]) -> Call:
    """A call that makes the call it stands for when it is used first: what `make` raises is then that candidate's."""
    made: list[Call] = []

    def call() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return call


class Timings(dict[str, list[float]]):
    """Candidate -> seconds per call, one value per round.

    Attributes:
        failed: candidate -> why it has none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__({name: [] for name in names})
        self.failed: dict[str, str] = {}


def interleave(
    candidates: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 1,
    repeats: int = 1,
    rest: float = 0.0,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Seconds per call of each candidate, one value per round.

    A round calls every candidate once (`repeats` times in a row, for short calls, and divides), starting with
    another one each time, so that none always runs after the same neighbour. A candidate that raises is left out
    from then on.

    Args:
        candidates: name -> a call that does the whole work to be timed.
        rounds: values per candidate.
        warmup: calls before the first timed one.
        rest: seconds of rest, and one call without timing after them, before each turn of a candidate: for candidates
            with thread pools of their own, whose threads go on waiting actively for a while.
        device: what to synchronize with (default: the CPU).
        clock: time.process_time counts this process's own time instead, also fair while others use the machine.

    Returns:
        name -> `rounds` seconds, the same index being the same round.
    """
    device = device or torch.device("cpu")
    seconds = Timings(list(candidates))
    for name, call in candidates.items():
        with noting_failure(seconds.failed, name):
            for _ in range(warmup):
                call()
    for turn in range(rounds):
        names = [name for name in candidates if name not in seconds.failed]
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            with noting_failure(seconds.failed, name):
                if rest:
                    time.sleep(rest)
                    candidates[name]()
                synchronize(device)
                started = clock()
                for _ in range(repeats):
                    candidates[name]()
                synchronize(device)
                seconds[name].append((clock() - started) / repeats)
    for name in seconds.failed:
        del seconds[name]
    return seconds


def speedup(seconds: Mapping[str, Sequence[float]], baseline: str, name: str) -> Spread:
    """How many times faster `name` is than `baseline`: the ratio of each round. NaN if one of them failed."""
    if baseline not in seconds or name not in seconds:
        return Spread(math.nan, math.nan, math.nan, 0)
    return Spread.of([a / b for a, b in zip(seconds[baseline], seconds[name], strict=True)])


class PeakMemory:
    """The largest memory in use inside a `with` block, in MiB.

    On CUDA the allocator's own peak. On a CPU the peak of the resident set (VmHWM, reset through
    /proc/self/clear_refs where the system has it, else the peak of the whole process).

    Attributes:
        before: in use on entry. peak: the largest until exit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0.0
        self.peak = 0.0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / MIB
        else:
            # Where that is not possible the peak since the start of the process is read: an upper bound.
            return_freed_memory()  # else it would count as in use before, and be used again
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device) / MIB
        else:
            self.peak = _resident("VmHWM")


def _resident(field: str) -> float:
    """A field of /proc/self/status in MiB; the peak of the process on systems without."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware, versions and git commit: figures can only be compared where these are known."""
    device = device or torch.device("cpu")
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {"machine": facts, "versions": versions(), "commit": git_commit()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def flops_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, rounds: int = 5) -> dict[str, float]:
    """GFLOP/s this machine reaches in a square matrix product and in a 3x3 convolution (channels-last)."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    channels, side, batch = 256, 16, 32
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        seconds = interleave(
            {"matmul": lambda: a @ a, "conv": lambda: F.conv2d(x, w, padding=1)}, rounds=rounds, device=device
        )
    work = {"matmul": 2 * size**3, "conv": 2 * batch * side**2 * channels**2 * 9}
    return {name: work[name] / Spread.of(values).median / 1e9 for name, values in seconds.items()}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], failed: Mapping[str, str] | None = None) -> None:
    """A Markdown table, readable in a terminal and ready for RESULTS.md.

    Args:
        failed: candidate -> why it failed; a row of its own each.
    """
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for index, line in enumerate((header, *rows)):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for name, reason in (failed or {}).items():
        print(f"| {name.ljust(widths[0])} | failed: {reason} |" + " |" * (len(header) - 2))


def print_json(
    benchmark: str,
    results: Mapping[str, Any],
    device: torch.device | None = None,
    failed: Mapping[str, str] | None = None,
) -> None:
    """The last line of every benchmark, in JSON; `failed` as in `print_table`."""
    facts = {"benchmark": benchmark, "argv": sys.argv[1:], **machine(device), "results": results}
    print(json.dumps(_without_nan(facts | ({"failed": failed} if failed else {}))))


def _without_nan(value: Any) -> Any:
    """None in place of NaN, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
