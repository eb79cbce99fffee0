"""The setting of malloc that `train` makes: what is freed stays in the process."""

import os
import platform
import subprocess
import sys

import pytest

# What glibc says of its memory (mallinfo2(3)) while three tensors of 24 MB live, and after they were freed.
_MEMORY_OF_A_STEP = """
import ctypes, sys, torch
from blockwise_lr.train.allocator import keep_freed_memory

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info

told = keep_freed_memory() if sys.argv[1] == "keep" else None
activations = [torch.ones(6_000_000) for _ in range(3)]
mapped = mallinfo().hblkhd
del activations
print(mapped // 1_000_000, mallinfo().fordblks // 1_000_000, told)
"""


def _memory_of_a_step(mode: str, **environment: str) -> tuple[int, int, str]:
    """MB in mappings of their own while in use, MB free but kept afterwards, what keep_freed_memory said."""
    inherited = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_OF_A_STEP, mode],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    mapped, kept, told = done.stdout.split()
    return int(mapped), int(kept), told


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_large_tensors_are_no_longer_mapped_and_unmapped_one_by_one() -> None:
    mapped, kept, _ = _memory_of_a_step("leave")
    assert mapped >= 72  # all three, given back when they die
    assert kept < 24
    mapped, kept, told = _memory_of_a_step("keep")
    assert told == "True"
    assert mapped < 24  # what was mapped before, by imports
    assert kept >= 72  # ready for the next step


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_setting_of_the_users_own_is_left_alone() -> None:
    assert _memory_of_a_step("keep", MALLOC_ARENA_MAX="4")[2] == "False"
