"""Keep freed memory in the process, so that the next step need not ask the system for it again."""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt(3): parameters of glibc's malloc, from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; for a process whose main job is to train on the CPU.

    By default glibc maps every large tensor afresh and unmaps it when freed, so each step pays for the page faults
    of its activations again, and small changes of the order in which tensors die change the time of a step.
    Peak memory stays as it is, but is not given back before the process ends (benchmarks/train_throughput.py
    measures both). Does nothing on other C libraries, or where the environment sets malloc by itself (``MALLOC_*``,
    ``LD_PRELOAD``).

    Returns:
        Whether malloc was told so.
    """
    chosen = any(name.startswith("MALLOC_") or name == "LD_PRELOAD" for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
