"""Keep freed memory in the process, so that the next training step can reuse it."""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt(3): parameters of glibc's malloc, from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Configure glibc's malloc to keep freed memory. Use this in a process that trains on the CPU.

    By default, glibc maps memory for every large tensor and unmaps it when the tensor is freed. Each step then pays for
    the page faults of its activations again, and step times depend on the order in which tensors are freed.

    Peak memory does not change, but the process returns it only at its end. benchmarks/train_throughput.py measures
    both. The call does nothing on other C libraries, or if the environment configures malloc (``MALLOC_*``,
    ``LD_PRELOAD``).

    Returns:
        Whether malloc accepted the setting.
    """
    chosen = any(name.startswith("MALLOC_") or name == "LD_PRELOAD" for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
