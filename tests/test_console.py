"""What is said about a run: how far it is, and the memory that it took."""

from __future__ import annotations

import logging
import resource
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from utils.run.console import Progress, peak_memory


@pytest.mark.parametrize(("platform", "shown"), [("linux", "3.0 GiB"), ("darwin", "0.0 GiB")])
def test_peak_memory_counts_in_the_unit_of_the_system(monkeypatch, platform, shown):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    assert peak_memory(torch.device("cpu")) == shown


def test_peak_memory_is_not_needed_where_it_cannot_be_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory(torch.device("cpu")) == "memory not known"


@pytest.mark.parametrize(("seconds", "expected"), [(1, [4, 8]), (25, [3, 4, 7, 8])])
def test_progress_has_a_line_at_every_interval_and_after_a_minute(monkeypatch, caplog, seconds, expected):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with caplog.at_level(logging.INFO), Progress("epoch 1/1", 10, 64, interval=4, show=True) as progress:
        for done in range(1, 11):
            now[0] += seconds
            progress.step(done)
    assert [int(line.split("step ")[1].split("/")[0]) for line in caplog.messages] == expected
    assert f"{64 / seconds:.0f} images/s" in caplog.messages[0]
