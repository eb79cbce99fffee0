"""kill -9 at random moments and inside the writing of checkpoints: the same command always goes on, to the bit."""

import random
import signal
from dataclasses import replace

import pytest

from blockwise_lr.checkpoints.manifest import MANIFEST, checkpoints
from faults.processes import last_step, report, result, rows, wait_for, written
from support.commands import run_command, start_command

TIMES = 20


@pytest.mark.slow
def test_killed_twenty_times_half_of_them_while_it_saves(tiny, tmp_path, record_property):
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    steps = 20 * TIMES
    tiny = replace(tiny, steps=steps, log_every=5, eval_every=20, save_every=5)
    tiny = replace(tiny, optim=replace(tiny.optim, base_lr=3e-3))
    arguments = ("train", written(tiny, tmp_path), "--out")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert run_command(*arguments, whole).returncode == 0

    def half_saved():
        return any(not (c / MANIFEST).exists() and any(c.iterdir()) for c in checkpoints(out))

    inside = 0
    for time in range(TIMES):
        process = start_command(*arguments, out)
        moment = chance.randint(18 * time + 3, 18 * time + 15)
        wait_for(lambda: last_step(out) >= moment, process)  # noqa: B023 (used at once)
        if time % 2:
            wait_for(half_saved, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended before it could be killed (seed {seed})"
        inside += half_saved()
    again = run_command(*arguments, out)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stderr
    assert rows(out) == rows(whole), f"seed {seed}"
    assert result(out) == result(whole)
    assert inside >= TIMES // 4
    report(
        record_property,
        "kill -9 at a random moment, every second time while a checkpoint is written",
        TIMES,
        f"resumed every time; every logged loss, norm and rate is bit-equal to an uninterrupted run ({inside} of "
        f"the kills left a half-written checkpoint)",
    )
