"""The command line, in this process and in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockwise_lr.cli.entry import main
from support.processes import Started, run_python, run_ranks


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, called in this process."""
    capsys.readouterr()  # what the test itself made libraries print
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as exit:
        code = int(exit.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def train_here(config: Path, folder: Path) -> list[str]:
    """Train a run of a comparison in this process, which has imported torch; return a command that only succeeds."""
    from blockwise_lr.train.config import config_from_dict
    from blockwise_lr.train.run import train

    train(config_from_dict(json.loads(config.read_text())), folder)
    return [sys.executable, "-c", ""]


def command_line(*arguments: str | Path, processes: int = 1) -> list[str]:
    return script_line("-m", "blockwise_lr", *arguments, processes=processes)


def script_line(*arguments: str | Path, processes: int = 1, restarts: int = 0) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        launcher += [f"--max-restarts={restarts}"]
    return [*launcher, *map(str, arguments)]


def run_command(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """`blockwise-lr ARGUMENTS` in a process of its own."""
    return run_script("-m", "blockwise_lr", *arguments, processes=processes)


def start_command(
    *arguments: str | Path, processes: int = 1, restarts: int = 0
) -> subprocess.Popen[str] | Started:
    """`blockwise-lr ARGUMENTS` in a process of its own, going on by itself."""
    return start_script("-m", "blockwise_lr", *arguments, processes=processes, restarts=restarts)


def start_script(
    *arguments: str | Path, processes: int = 1, restarts: int = 0
) -> subprocess.Popen[str] | Started:
    """`python ARGUMENTS` in a process of its own, going on by itself; several: under torchrun."""
    if processes == 1:
        return Started(list(map(str, arguments)))
    return subprocess.Popen(
        script_line(*arguments, processes=processes, restarts=restarts),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run_script(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in a process of its own, or as several ranks, to its end."""
    if processes == 1:
        return run_python(*arguments, seconds=1000)
    return run_ranks(*arguments, processes=processes, seconds=1000)
