"""Several real processes for tests of what is distributed."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Done:
    """A process that has ended, as ``subprocess.CompletedProcess`` describes it."""

    returncode: int
    stdout: str
    stderr: str


def run_code(code: str, folder: Path, seconds: float = 200) -> Done:
    """Run Python code in a process of its own, in `folder`, with torch and transformers imported already."""
    forkserver.set_forkserver_preload(_IMPORTS)
    with tempfile.TemporaryDirectory() as streams:
        paths = [Path(streams) / name for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("forkserver").Process(target=_run, args=(code, folder, paths))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return Done(process.exitcode, *(path.read_text() if path.exists() else "" for path in paths))


def _run(code: str, folder: Path, paths: Sequence[Path]) -> None:
    os.chdir(folder)
    for descriptor, path in enumerate(paths, start=1):
        with path.open("wb") as stream:
            os.dup2(stream.fileno(), descriptor)
    torch.set_num_threads(1)
    sys.argv = ["-c"]
    sys.modules["__main__"].__dict__.update(__name__="__main__", __file__="<code>")
    exec(compile(code, "<code>", "exec"), sys.modules["__main__"].__dict__)
