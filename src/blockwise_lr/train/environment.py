"""Where a run was made: package versions, commit, hardware, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("blockwise-lr", "torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")


def describe_environment(device: str) -> dict[str, Any]:
    """Everything about this machine and installation that a run's numbers may depend on.

    Args:
        device: "cpu" or "cuda", the one that trains.

    Example:
        >>> sorted(describe_environment("cpu"))
        ['date', 'git_commit', 'hardware', 'versions']
    """
    import torch

    hardware: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["gpus"] = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": git_commit(),
        "hardware": hardware,
    }


def git_commit() -> str | None:
    """The commit of this package's checkout, with "+changes" if files differ from it; None where there is no git."""
    here = Path(__file__).parent
    try:
        _git(
            here, "ls-files", "--error-unmatch", __file__
        )  # or it is somebody else's repository around a .venv
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--", str(here.parent)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
