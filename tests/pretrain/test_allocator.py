"""The setting of malloc that `train` makes: what is freed is not asked for again."""

import os
import platform
import subprocess
import sys

import pytest

_FAULTS_OF_40_STEPS = """
import resource, sys, torch
from blockwise_lr.pretrain.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def step():
    activations = [torch.ones(6_000_000) for _ in range(3)]
step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, kept)
"""


def _page_faults(mode: str, **environment: str) -> tuple[int, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS_OF_40_STEPS, mode],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    faults, kept = done.stdout.split()
    return int(faults), kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept_so_that_steps_cause_no_page_faults() -> None:
    (before, _), (after, kept) = _page_faults("leave"), _page_faults("keep")
    assert kept == "True"
    assert after < before / 20, f"{after} page faults with the setting, {before} without"


def test_a_setting_of_the_users_own_is_left_alone() -> None:
    assert _page_faults("keep", MALLOC_ARENA_MAX="4")[1] == "False"
