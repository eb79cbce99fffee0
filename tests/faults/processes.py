"""Runs in processes of their own, to be killed, starved and damaged; and what the page of reliability is made from."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.metrics import read_metrics
from support.processes import Started

Record = Callable[[str, object], None]


def report(record: Record, fault: str, times: int, outcome: str) -> None:
    """One row of docs/reference/reliability.md, which `python tools/docs/reliability_page.py` writes."""
    for name, value in (("fault", fault), ("times", times), ("outcome", outcome)):
        record(name, value)


def written(config: TrainConfig, folder: Path) -> Path:
    """The configuration as a file that `train` takes."""
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    return path


def rows(out: Path) -> list[dict[str, Any]]:
    """The run's rows, but for the seconds it took."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def result(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "result.json").read_text())
    return content | {"seconds": 0}


def wait_for(
    what: Callable[[], bool], process: subprocess.Popen[str] | Started, seconds: float = 120
) -> None:
    """Until it is so, or the process has ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


def last_step(out: Path) -> int:
    there = read_metrics(out / "metrics.jsonl")
    return int(there[-1]["step"]) if there else 0
