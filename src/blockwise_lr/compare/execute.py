"""Run the training runs of a plan in parallel processes, and skip those that are already finished."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from blockwise_lr.compare.comparison_progress import ComparisonProgress
from blockwise_lr.compare.plan import Plan, Run
from blockwise_lr.compare.results import check_unchanged, is_finished, read_run
from blockwise_lr.errors import SigtermInterrupt, UserError
from blockwise_lr.files import make_folder, write_json_atomic
from blockwise_lr.locks import HeldError, take_lock
from blockwise_lr.train.config import TrainConfig

Runner = Callable[[Path, Path], Sequence[str]]
"""A function from (config.json of a run, folder of the run) to the command line that trains it."""

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0


def train_command(config: Path, folder: Path) -> list[str]:
    """Return the command line that trains one run with the current Python interpreter."""
    return [sys.executable, "-m", "blockwise_lr", "train", str(config), "--out", str(folder)]


def run_all(
    plan: Plan,
    out: str | Path,
    jobs: int = 1,
    progress: ComparisonProgress | None = None,
    *,
    runner: Runner = train_command,
) -> None:
    """Train every run of `plan` that is not finished yet: first the grid, then all seeds at the chosen settings.

    A run's folder is out/runs/NAME. Its configuration and its log are out/runs/NAME.config.json and
    out/runs/NAME.log. Runs in parallel share the CPU cores equally. Ctrl-C and SIGTERM end the runs; the next call
    resumes them from their checkpoints.

    Args:
        plan: the runs to train.
        out: the comparison's folder, created if missing.
        jobs: number of runs in parallel.
        progress: where to show progress. Default: standard output.
        runner: returns the command line of a run, for tests and other launchers.

    Raises:
        UserError: a run failed (the message has the last line of its log), another comparison is running in `out`,
            or `jobs` is not positive.
        KeyboardInterrupt: on Ctrl-C, after the runs have ended; on SIGTERM, its subclass SigtermInterrupt.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1; got {jobs}")
    out = Path(out)
    make_folder(out)  # on its own, so that an error names `out` if it is a file
    make_folder(out / "runs")
    try:
        lock = take_lock(out / ".lock")
    except HeldError as held:
        raise UserError(
            f"another comparison is running in {out}; wait for it, or give another --out{held.advice}"
        ) from None
    try:
        with sigterm_interrupts(), progress or ComparisonProgress() as shown:
            tuning = plan.tuning_runs()
            _run_missing(tuning, out, jobs, shown, runner, "tuning base learning rates")
            losses = _tune_losses(tuning, out)
            refining = plan.refining_runs(losses)
            _run_missing(refining, out, jobs, shown, runner, "refining base learning rates")
            losses |= _tune_losses(refining, out)
            _run_missing(plan.final_runs(plan.choose(losses)), out, jobs, shown, runner, "comparison")
    finally:
        lock.release()


def _tune_losses(runs: Sequence[Run], out: Path) -> dict[Run, float]:
    return {run: read_run(out / "runs" / run.folder).tune_loss for run in runs}


def _run_missing(
    runs: Sequence[Run], out: Path, jobs: int, progress: ComparisonProgress, runner: Runner, phase: str
) -> None:
    runs_by_folder = {run.folder: run for run in runs}
    for name, run in runs_by_folder.items():
        check_unchanged(run, out / "runs" / name)
    missing = [run for name, run in runs_by_folder.items() if not is_finished(out / "runs" / name)]
    progress.phase(phase, len(runs_by_folder), len(runs_by_folder) - len(missing))
    # Starting with the longest runs keeps all `jobs` processes busy.
    pending = sorted(missing, key=lambda run: -run.config.steps)
    active: dict[subprocess.Popen[bytes], Run] = {}
    try:
        while pending or active:
            while pending and len(active) < jobs:
                with interrupts_delayed():  # an interrupt in here could leave a process that nothing ends
                    run = pending[0]
                    active[_start(run, out, jobs, runner)] = pending.pop(0)
                progress.started(run)
            for process in [process for process in active if process.poll() is not None]:
                run = active.pop(process)
                _check_result(run, out, process.returncode)
                progress.finished(run, read_run(out / "runs" / run.folder))
            progress.poll((run, out / "runs" / run.folder) for run in active.values())
            if active:
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        left = len(pending) + len(active)
        progress.print_line(
            f"interrupted with {left} of {len(runs_by_folder)} runs unfinished; run the same command again to resume"
        )
        raise
    finally:
        terminate_processes(list(active))


def _start(run: Run, out: Path, jobs: int, runner: Runner) -> subprocess.Popen[bytes]:
    folder = out / "runs" / run.folder
    config = folder.with_name(f"{run.folder}.config.json")
    write_json_atomic(config, run.config.to_dict())
    threads = str(max(1, available_cores() // jobs))
    # Unbuffered, so that the log ends with the last message even if the process is killed.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if run.config.device != "cuda":
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with log_path(run, out).open("ab") as log:
        return subprocess.Popen(
            runner(config, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def log_path(run: Run, out: Path) -> Path:
    """Return the path of the log with the output of a run's process."""
    return out / "runs" / f"{run.folder}.log"


def _check_result(run: Run, out: Path, code: int) -> None:
    # result.json is written last, so it marks a finished run whatever the exit code; a diverged run exits with 1.
    if is_finished(out / "runs" / run.folder):
        return
    log = log_path(run, out)
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if code == 0:
        how += " without a result.json"
    raise UserError(f"run {run.folder} {how}: {last} (log: {log})")


def terminate_processes(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """End processes: SIGTERM to all, and SIGKILL to those that are still running ten seconds later."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_jobs(config: TrainConfig) -> int:
    """Return the number of parallel runs: small models on the CPU finish sooner as one single-threaded run per core."""
    from blockwise_lr.train.build_model import count_parameters  # imported here because it loads transformers

    small = count_parameters(config.model) < 10_000_000
    return available_cores() if small and config.device == "cpu" else 1


@contextlib.contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {
        number: signal.signal(number, lambda signum, frame: received.append(signum)) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise SigtermInterrupt on SIGTERM, so that the runs are ended too.

    Otherwise a scheduler's SIGTERM would leave them running, and they would write into the folders of the next call.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise SigtermInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
