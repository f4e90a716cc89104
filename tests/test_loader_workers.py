"""Processes that load samples end with the one that trains."""

from __future__ import annotations

import signal
import sys

import processes
import pytest

from utils import loader_workers


def tied(start_method):
    """A worker whose parent is not the process that asked for it."""
    loader_workers.multiprocessing.get_start_method = lambda: start_method
    loader_workers.tie_to_the_main_process(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_whose_main_process_was_killed_while_it_started_ends(tmp_path):
    # These come from a fork server: for a forked worker, that would mean that another process has adopted it.
    children = [processes.start(tied, method, cwd=tmp_path) for method in ("fork", "forkserver")]
    assert processes.finish(*children) == [-signal.SIGKILL, 0]
