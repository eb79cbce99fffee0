"""A process of a run that dies: all others end soon, one of them says so, and the same command goes on."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from blockwise_lr.train.config import TrainConfig
from faults.processes import last_step, report, result, rows, wait_for, written
from support.commands import run_command, start_command


def children(pid: int) -> dict[int, int]:
    """Processes by their rank, below torchrun's."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):  # gone meanwhile
            continue
        ranks = [int(v.partition(b"=")[2]) for v in variables if v.startswith(b"RANK=")]
        if parent == pid and ranks:
            found[ranks[0]] = int(stat.parent.name)
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def config(tiny: TrainConfig) -> TrainConfig:
    """A run long enough to lose a process halfway."""
    config = replace(tiny, steps=200, log_every=10, eval_every=50, save_every=20)
    return replace(config, optim=replace(config.optim, base_lr=3e-3))


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run of two processes without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_command("train", written(config, folder), "--out", folder / "run", processes=2)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_all_end_within_a_minute_and_one_says_so(config, whole, tmp_path, record_property, lost):
    arguments = ("train", written(config, tmp_path), "--out")
    out = tmp_path / "run"
    process = start_command(*arguments, out, processes=2)
    wait_for(lambda: last_step(out) >= 50, process)
    ranks = children(process.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[lost], signal.SIGKILL)
    since = time.monotonic()
    _, said = process.communicate(timeout=100)
    seconds = time.monotonic() - since
    assert process.returncode
    assert seconds < 60
    assert not any(alive(pid) for pid in ranks.values())
    lines = [line for line in said.splitlines() if line.startswith("blockwise-lr: ")]
    assert len(lines) == 1, said
    assert "another process of this run has exited" in lines[0]
    again = run_command(*arguments, out, processes=2)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stderr
    assert rows(out) == rows(whole)
    assert result(out) == result(whole)
    report(
        record_property,
        f"kill -9 of rank {lost} of two",
        1,
        "the other exits within a minute with a one-line error; torchrun names the killed one; resumes bit-exactly",
    )


@pytest.mark.slow
def test_torchrun_starts_them_again_and_they_go_on(config, whole, tmp_path, record_property, monkeypatch):
    # Without it torch's new processes look for the old ones: https://github.com/pytorch/pytorch/issues/135712.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    arguments = ("train", written(config, tmp_path), "--out")
    out = tmp_path / "run"
    process = start_command(*arguments, out, processes=2, restarts=1)
    wait_for(lambda: last_step(out) >= 50, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "resuming from" in said
    assert rows(out) == rows(whole)
    assert result(out) == result(whole)
    report(
        record_property,
        "kill -9 of rank 1 of two under torchrun --max-restarts=1",
        1,
        "torchrun restarts both ranks; they resume from the last checkpoint, bit-exactly",
    )
