"""Comparisons of synthetic runs: real processes and real files, but closed-form loss curves instead of training."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from blockwise_lr.compare import Arm, compare
from blockwise_lr.compare.progress import ComparisonProgress
from blockwise_lr.pretrain.config import TrainConfig

TRAINER = Path(__file__).with_name("synthetic_trainer.py")
BASE = TrainConfig(steps=60, log_every=3, eval_every=6)


def synthetic_run(config: Path, folder: Path) -> list[str]:
    return [sys.executable, str(TRAINER), str(config), str(folder)]


Compare = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def synthetic_compare() -> Compare:
    """`compare` over synthetic runs; arms as text."""

    def run(
        out: Path, arms: Sequence[str] = ("adamw:uniform", "adamw:paper"), **options: Any
    ) -> dict[str, Any]:
        options = {"seeds": [0], "command": "blockwise-lr compare quickstart", "jobs": 2} | options
        options.setdefault("progress", ComparisonProgress(enabled=False))
        return compare(
            options.pop("base", BASE),
            [Arm.parse(arm) for arm in arms],
            out=out,
            runner=synthetic_run,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def tuned_comparison(
    synthetic_compare: Compare, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Three arms, three seeds, a grid of five: its folder and its compare.json."""
    out = tmp_path_factory.mktemp("comparison")
    arms = ["uniform=adamw:uniform", "paper=adamw:paper", "quickstart=adamw:quickstart"]
    return out, synthetic_compare(out, arms, seeds=[0, 1, 2], base_lrs=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
