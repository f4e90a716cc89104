"""Freed memory is kept for the next step where that was asked for, and only there."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# In a process of its own: what is set holds for the rest of a process.
PROGRAM = """
import sys
import torch
from benchmarks.measure import _resident
from utils.run.allocator import keep_freed_memory

def resident_after_freeing():
    before = _resident("VmRSS")
    block = torch.ones(32 * 2**20)  # 128 MiB
    del block
    return _resident("VmRSS") - before

assert keep_freed_memory(False)
returned = resident_after_freeing()
assert keep_freed_memory()
kept = resident_after_freeing()
# glibc keeps up to seven gaps of an alignment from joining the hole beside them: as many holes do not fit again.
for _ in range(10):
    resident_after_freeing()
again = sum(resident_after_freeing() for _ in range(5))
print(returned, kept, again)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_kept_and_used_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    returned, kept, again = (float(word) for word in done.stdout.split())
    assert returned < 32
    assert kept > 96
    assert again < 32


def test_another_c_library_is_left_alone(monkeypatch):
    from utils.run import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("the C library was touched"))
    assert allocator.keep_freed_memory() is False
