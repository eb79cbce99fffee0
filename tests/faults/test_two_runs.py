"""Two runs in one folder: the second is refused while the first lives, and not by one that died."""

import signal
from dataclasses import replace

import pytest

from faults.processes import last_step, report, wait_for, written
from support.commands import run_command, start_command


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_dead_one_holds_nothing(tiny, tmp_path, record_property):
    config = replace(tiny, steps=2000, log_every=10, eval_every=0, save_every=20)
    arguments = ("train", written(config, tmp_path), "--out", tmp_path / "run")
    first = start_command(*arguments)
    wait_for(lambda: last_step(tmp_path / "run") >= 10, first)
    first.send_signal(signal.SIGSTOP)  # so that it cannot finish meanwhile
    second = run_command(*arguments)
    assert second.returncode == 2
    assert second.stderr.splitlines()[-1] == (
        f"blockwise-lr: another process is training in {tmp_path / 'run'}: wait for it, or choose another --out"
    )
    first.send_signal(signal.SIGKILL)
    first.communicate()
    third = start_command(*arguments)
    step = last_step(tmp_path / "run")
    wait_for(lambda: last_step(tmp_path / "run") > step, third)
    assert third.poll() is None, third.communicate()
    third.send_signal(signal.SIGKILL)
    third.communicate()
    report(
        record_property,
        "a second run in the folder of a running run, then of a killed run",
        2,
        "refused in the first case, accepted in the second",
    )
