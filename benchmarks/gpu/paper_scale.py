"""LLaMA-134M over 1 000 and 2 000 steps, by the runner of studies/2026-11-paper-scale in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import blockwise_lr
from gpu.paper_runs import RUNS
from gpu.run_parts import Task

RUNNER = Path(__file__).parents[2] / "studies" / "2026-11-paper-scale" / "train.py"


def measure(task: Task) -> None:
    """Run the arms that fit into the time that is left. The runner writes after every run and resumes.

    Raises:
        SystemExit: there is no text, the runner failed, or runs are left.
    """
    if not (task.real_text or task.tiny):
        raise SystemExit(
            "the paper's size needs text: --data FOLDER with train.bin and val.bin, GPT-2's tokens"
        )
    results = task.out / f"gpu-paper-scale-runs{'-tiny' if task.tiny else ''}.json"
    if task.tiny:
        results.unlink(missing_ok=True)
    command = runner_command(task, results)
    task.record.add(settings={"command": command})
    library = str(Path(blockwise_lr.__file__).parents[1])  # it may be found by sys.path alone
    path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
    found = json.loads(results.read_text(encoding="utf-8"))["runs"] if results.exists() else []
    task.record.add(runs=found)
    if done.returncode:
        raise SystemExit(f"the runner ended with exit code {done.returncode} after {len(found)} runs")
    if not task.tiny and len(found) < len(RUNS):
        raise SystemExit(f"{len(found)} of {len(RUNS)} runs are done; call again for the others")


def runner_command(task: Task, results: Path) -> list[str]:
    """Return the command that makes the runs: the only place that knows the runner's options."""
    runs = [f"{run.rpartition(':')[0]}:4" if task.tiny else run for run in RUNS]
    command = [sys.executable, str(RUNNER), "--data", str(task.data), "--out", str(results)]
    command += ["--device", task.device, "--runs", *runs]
    if task.tiny:
        command.append("--tiny")
    if task.seconds is not None:
        command += ["--budget-seconds", f"{task.seconds - 5:.0f}"]
    return command
