"""examples/cluster on one machine: two processes train as one, end at SIGTERM or with a lost one, and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from blockwise_lr.train.config import TrainConfig

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # torchrun
    "OMP_NUM_THREADS": "1",
    "PROCESSES": "2",
}
FSDP2 = ["torchrun.sh", CLUSTER / "fsdp2.py"]
SHORT = ["--steps", "12", "--log-every", "1", "--save-every", "4", "--width", "32", "--context", "16"]


def started(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    script, *rest = map(str, arguments)
    return subprocess.Popen(
        ["bash", str(CLUSTER / script), *rest],
        env={**ENVIRONMENT, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str], *, fails: bool = False) -> str:
    out, err = process.communicate(timeout=300)
    assert (process.returncode != 0) == fails, err
    return out


def losses(out: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): loss (\S+)$", out, re.M)}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def until(process: subprocess.Popen[str], beginning: str) -> str:
    """What it has printed until a line that begins so."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if line.startswith(beginning):
            return seen
    raise AssertionError(f"it ended before {beginning!r}:\n{seen}")


@pytest.mark.slow
def test_the_sharded_loop_ends_at_sigterm_and_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    expected = losses(output(started(*FSDP2, "--out", tmp_path / "one", *SHORT, PROCESSES="1")))
    assert list(expected) == list(range(1, 13))
    assert expected[12] < expected[1] - 0.1
    assert checkpoints(tmp_path / "one") == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]

    process = started(*FSDP2, "--out", tmp_path / "two", *SHORT)
    before = until(process, "step 2:")
    process.send_signal(signal.SIGTERM)
    before += output(process, fails=True)
    (stopped,) = map(int, re.findall(r"SIGTERM: saved step (\d+); the same command goes on", before))
    assert f"checkpoint-{stopped}" in checkpoints(tmp_path / "two")
    found = losses(before)
    assert found == {step: pytest.approx(expected[step], abs=1e-3) for step in range(1, stopped + 1)}

    found = losses(output(started(*FSDP2, "--out", tmp_path / "two", *SHORT)))
    assert found == {step: pytest.approx(expected[step], abs=1e-3) for step in range(stopped + 1, 13)}


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    arguments = [*FSDP2, "--out", tmp_path, *SHORT]
    process = started(*arguments)
    until(process, "step 5:")
    workers = psutil.Process(process.pid).children(recursive=True)
    lost = next(worker for worker in workers if worker.environ().get("RANK") == "1")
    lost.kill()
    output(process, fails=True)
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)
    newest = max(int(name.removeprefix("checkpoint-")) for name in checkpoints(tmp_path))
    assert newest in (4, 8)
    assert list(losses(output(started(*arguments)))) == list(range(newest + 1, 13))


@pytest.mark.slow
def test_the_slurm_script_trains_on_one_machine_without_slurm(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.to_dict()))
    command = ["slurm.sh", "-m", "blockwise_lr", "train", tmp_path / "tiny.json", "--out", tmp_path / "run"]
    variables = {"SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost"}
    output(started(*command, **variables))
    result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert result["steps"] == 24
    assert config["processes"] == 2


def test_the_slurm_script_says_what_it_lacks_without_slurm() -> None:
    variables = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh")], env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "SLURM_NNODES: set by Slurm" in done.stderr


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    process = started(*FSDP2, "--out", tmp_path, "--batch-size", "3")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "--batch-size is 3; expected a multiple of 2 processes" in err
