"""Several real processes for tests of what is distributed."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

# Imported once, by the process that all others are forked from: each would take seconds for it.
_IMPORTS = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
    "transformers.trainer",
    "blockwise_lr.train.run",
    "support.frozen",
]


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """Run `function(rank, *arguments)` in several processes that share nothing, and raise what one of them raised."""
    forkserver.set_forkserver_preload(_IMPORTS)
    multiprocessing.start_processes(function, arguments, nprocs=processes, start_method="forkserver")


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port: int = listening.getsockname()[1]
        return port


class Started:
    """A Python process that goes on by itself; its methods are those of ``subprocess.Popen`` with text streams."""

    def __init__(
        self, words: Sequence[str], folder: Path | None = None, environment: dict[str, str] | None = None
    ) -> None:
        forkserver.set_forkserver_preload(_IMPORTS)
        self.args = list(words)
        self._streams = tempfile.TemporaryDirectory()
        self._paths = [Path(self._streams.name) / name for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process = context.Process(
            target=_run, args=(self.args, folder or Path.cwd(), self._paths, variables)
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") for path in self._paths)
        return out, err


def run_python(
    *words: str | Path, folder: Path | None = None, seconds: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` in a process of its own, with torch and transformers imported already.

    Args:
        words: "-c" and code, "-m" and a module, or a script; then its arguments.
        folder: where it runs. Default: here.
        seconds: it is killed after as many.
    """
    started = Started(list(map(str, words)), folder)
    try:
        out, err = started.communicate(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # its children too
    return subprocess.CompletedProcess(started.args, started.wait(), out, err)


def run_ranks(*words: str | Path, processes: int, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` in several processes with the variables that torchrun sets, as ranks of one process group.

    The streams are those of rank 0 and then of the others; the exit code is the first that is not 0.
    """
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    ranks = [
        Started(
            list(map(str, words)),
            environment={
                **together,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(processes),
            },
        )
        for rank in range(processes)
    ]
    try:
        streams = [each.communicate(seconds) for each in ranks]
    finally:
        for each in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)
    code = next((each.returncode for each in ranks if each.returncode), 0)
    return subprocess.CompletedProcess(
        ranks[0].args, code, "".join(out for out, _ in streams), "".join(err for _, err in streams)
    )


def _run(words: list[str], folder: Path, paths: Sequence[Path], environment: dict[str, str]) -> None:
    """What ``python WORDS`` does, in a process that was forked."""
    for descriptor, path in enumerate(paths, start=1):
        with path.open("wb") as stream:
            os.dup2(stream.fileno(), descriptor)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    kind, rest = words[0], words[1:]
    try:
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.path.insert(0, "")
            names = sys.modules["__main__"].__dict__
            names.update(__name__="__main__", __file__="<code>")
            exec(compile(rest[0], "<code>", "exec"), names)
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
    finally:
        sys.stdout.flush()
