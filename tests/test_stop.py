"""Signals that ask a run to stop."""

from __future__ import annotations

import signal

import pytest

from utils.train import recovery
from utils.train.recovery import StopRequest


def test_a_second_ctrl_c_stops_at_once_but_only_some_seconds_later(monkeypatch):
    """A launcher sends a signal several times, also to a process that writes its checkpoint."""
    now = 100.0
    monkeypatch.setattr(recovery.time, "monotonic", lambda: now)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert stop.signal_number is None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
            assert stop.signal_number == signal.SIGTERM
        now += 6
        signal.raise_signal(signal.SIGTERM)  # of a cluster, which kills later anyhow
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
