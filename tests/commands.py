"""The command line in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command_line(*arguments: str | Path, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return [*launcher, "-m", "blockwise_lr", *map(str, arguments)]


def run_command(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """`blockwise-lr ARGUMENTS` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command_line(*arguments, processes=processes),
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
