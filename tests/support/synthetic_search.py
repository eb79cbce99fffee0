"""Searches with closed-form losses in place of training: see synthetic_worker."""

import sys
from pathlib import Path

from rich.console import Console

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.train.config import ModelConfig, OptimConfig, TrainConfig
from blockwise_lr.tune.search import run_search
from blockwise_lr.tune.search_plan import SearchPlan
from blockwise_lr.tune.search_progress import SearchProgress
from blockwise_lr.tune.trial_store import TrialStore

WORKER = (sys.executable, str(Path(__file__).with_name("synthetic_worker.py")))
BASE = TrainConfig(
    steps=100,
    device="cpu",
    model=ModelConfig(hidden_size=16, layers=2, heads=2, vocab_size=64, context=16),
    data=DataConfig(data="none"),
    optim=OptimConfig(base_lr=4e-3, ratios="uniform"),
)
PLAN = SearchPlan(BASE, trials=14, repeats=2, sampler="trust-region")


def quiet() -> SearchProgress:
    return SearchProgress(Console(quiet=True))


def search(plan: SearchPlan, out: Path, workers: int = 1) -> TrialStore:
    return run_search(plan, out, workers, quiet(), worker=WORKER)
