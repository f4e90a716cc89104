"""Processes that load samples end with the one that trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A main process that is killed while its workers load: they are not told, and their queue is not closed.
PROGRAM = """
import os, signal, sys, time
import torch
from utils.data.workers import tie_to_the_main_process

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        time.sleep(0.01)
        return os.getpid()

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(
        Slow(), num_workers=2, worker_init_fn=tie_to_the_main_process, multiprocessing_context=sys.argv[1]
    )
    batches = iter(loader)
    print(*{int(next(batches)) for _ in range(6)}, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_workers_end_with_a_killed_main_process(tmp_path, start_method):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Into a file: a worker left over would keep a pipe open.
    with (tmp_path / "pids").open("w+") as said:
        done = subprocess.run([sys.executable, str(program), start_method], stdout=said, env=environment, timeout=300)
        said.seek(0)
        workers = [int(word) for word in said.read().split()]
    assert done.returncode == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in workers if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
