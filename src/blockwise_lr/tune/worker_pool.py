"""The worker processes of a search: start them, give them trials, and collect their answers."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from blockwise_lr.compare.execute import available_cores, interrupts_delayed, terminate_processes
from blockwise_lr.errors import UserError

COMMAND = (sys.executable, "-m", "blockwise_lr.tune.trial_worker")
"""The command line of a worker."""


class WorkerPool:
    """A context manager that runs trials in worker processes. Leaving it ends the processes.

    A worker starts with its first trial. Its log is `logs`/worker-N.log. On the CPU, the workers share the cores.

    Args:
        size: number of workers.
        logs: folder of the logs.
        cpu: whether the trials run on the CPU.
        command: the command line of a worker, for tests.
    """

    def __init__(self, size: int, logs: Path, *, cpu: bool, command: Sequence[str] = COMMAND) -> None:
        self._size, self._logs, self._command = size, logs, command
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if cpu:
            threads = str(max(1, available_cores() // size))
            self._environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._processes: list[subprocess.Popen[str]] = []
        self._trials: dict[int, int] = {}  # worker: number of its trial
        self._answers: queue.Queue[tuple[int, str]] = queue.Queue()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.stdin is not None and not process.stdin.closed:
                # Closing writes what is left of a task, which fails if the worker has exited.
                with contextlib.suppress(OSError):
                    process.stdin.close()
        terminate_processes(self._processes)

    @property
    def is_full(self) -> bool:
        """Whether every worker has a trial."""
        return len(self._trials) == self._size

    @property
    def running(self) -> list[int]:
        """The numbers of the trials that are being trained."""
        return list(self._trials.values())

    def submit(self, number: int, task: Mapping[str, Any]) -> None:
        """Give a trial to a free worker."""
        worker = next(i for i in range(self._size) if i not in self._trials)
        if worker == len(self._processes):
            with interrupts_delayed():  # an interrupt in here could leave a process that nothing ends
                self._processes.append(self._start(worker))
        self._trials[worker] = number
        stdin = self._processes[worker].stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(task, allow_nan=False) + "\n")
            stdin.flush()
        except BrokenPipeError:
            self._raise_lost(worker)

    def poll(self, seconds: float) -> tuple[int, dict[str, Any]] | None:
        """Return the number of a trial that has ended and the worker's answer; None if none ends in this time.

        Raises:
            UserError: a trial failed, or a worker exited.
        """
        try:
            worker, line = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        if not line:
            self._raise_lost(worker)
        number, answer = self._trials.pop(worker), json.loads(line)
        if answer["status"] == "failed":
            raise UserError(f"trial {number}: {answer['message']}")
        return number, answer

    def _start(self, worker: int) -> subprocess.Popen[str]:
        with self._log(worker).open("ab") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                text=True,
                encoding="utf-8",
            )
        threading.Thread(target=self._read, args=(worker, process), daemon=True).start()
        return process

    def _read(self, worker: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._answers.put((worker, line))
        self._answers.put((worker, ""))

    def _log(self, worker: int) -> Path:
        return self._logs / f"worker-{worker}.log"

    def _raise_lost(self, worker: int) -> None:
        code = self._processes[worker].wait()
        log = self._log(worker)
        lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        trial = f"of trial {self._trials[worker]} " if worker in self._trials else ""
        raise UserError(f"the process {trial}{how}: {last} (log: {log}); the same command goes on from here")
