"""Tell the C library's allocator to keep freed memory, for training and evaluation on a CPU.

glibc gives a tensor of more than 32 MiB back to the system when it is freed. The next step asks for the same memory
again, and the system first fills every page of it with zeros. That takes a tenth of a training step, or more.
"""

from __future__ import annotations

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# Where glibc's thresholds end up by themselves in a process that frees large blocks.
_LARGEST_MMAP_THRESHOLD = 32 * 1024**2
_DEFAULT_MMAP_MAX = 65536


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the process keep freed memory for its next use, or (with False) do as glibc does by default.

    The memory that is kept grows to about the largest amount in use at once. Measured over 14 training steps, that was
    no more than the peak without it.

    Returns:
        Whether that was done: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    if keep:
        return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
    return bool(
        mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        and mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        and mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
    )


def return_freed_memory() -> None:
    """Give what is free back to the system now; without glibc nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
