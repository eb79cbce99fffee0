"""Describe the environment of a run: package versions, git commit, hardware and date."""

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
    """Return everything about this machine and installation that a run's numbers may depend on.

    Args:
        device: the device that trains, "cpu" or "cuda".

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
    """Return the git commit of this package's checkout; None if it is not in a git repository.

    The commit ends in "+changes" if a file of the package differs from it.
    """
    here = Path(__file__).parent
    try:
        # Fails in a repository that does not track this file, such as one that only contains the .venv.
        _git(here, "ls-files", "--error-unmatch", __file__)
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
