"""Comparisons of synthetic runs: real processes and files, closed-form losses instead of training."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockwise_lr.compare import Arm, Plan, compare
from blockwise_lr.compare.comparison_progress import ComparisonProgress
from blockwise_lr.compare.execute import run_all
from blockwise_lr.compare.findings import build_content
from blockwise_lr.compare.results import read_results
from blockwise_lr.train.config import TrainConfig

TRAINER = Path(__file__).with_name("synthetic_trainer.py")
BASE = TrainConfig(steps=60, log_every=3, eval_every=6, save_every=0)
TWO_ARMS = ("adamw:uniform", "adamw:paper")


def synthetic_run(config: Path, folder: Path) -> list[str]:
    return [sys.executable, str(TRAINER), str(config), str(folder)]


def quiet() -> ComparisonProgress:
    return ComparisonProgress(enabled=False)


def synthetic_compare(out: Path, arms: Sequence[str] = TWO_ARMS, **options: Any) -> dict[str, Any]:
    """`compare` over synthetic runs, reports and figures included; arms as text."""
    options = {"base": BASE, "seeds": [0], "command": "blockwise-lr compare quickstart"} | options
    base = options.pop("base")
    parsed = [Arm.parse(arm) for arm in arms]
    return compare(base, parsed, out=out, jobs=2, runner=synthetic_run, progress=quiet(), **options)


def synthetic_content(out: Path, arms: Sequence[str] = TWO_ARMS, **options: Any) -> dict[str, Any]:
    """The content of compare.json over synthetic runs, without the time that figures take."""
    options = {"base": BASE, "seeds": (0,)} | options
    plan = Plan(arms=tuple(Arm.parse(arm) for arm in arms), **options)
    run_all(plan, out, 2, quiet(), runner=synthetic_run)
    content = build_content(read_results(plan, out), out, command="", date="")
    return json.loads(json.dumps(content, allow_nan=False))
