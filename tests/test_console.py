"""What is said about a run: the memory that it took."""

from __future__ import annotations

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from utils.run.console import peak_memory


@pytest.mark.parametrize(("platform", "shown"), [("linux", "3.0 GiB"), ("darwin", "0.0 GiB")])
def test_peak_memory_counts_in_the_unit_of_the_system(monkeypatch, platform, shown):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    assert peak_memory(torch.device("cpu")) == shown


def test_peak_memory_is_not_needed_where_it_cannot_be_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory(torch.device("cpu")) == "memory not known"
