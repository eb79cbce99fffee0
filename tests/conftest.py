"""Fixtures of all tests. Being here also puts tests/ on sys.path, so that `from support.cases import CASES` works."""

from __future__ import annotations

import contextlib
import gc
import random
from dataclasses import replace
from pathlib import Path

import pytest

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.train.config import ModelConfig, OptimConfig, TrainConfig

with contextlib.suppress(ImportError):  # the environment of `make lower-bounds` has no hypothesis
    from hypothesis import HealthCheck, settings

    # How long an example takes says what else the machine does, and nothing about the code.
    settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy machine")

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "government",
    "people",
    "states",
    "nation",
    "congress",
    "war",
    "peace",
    "law",
    "year",
]


LONGEST = (
    "test_benchmarks.py",
    "compare/test_end_to_end.py",
    "distributed/test_equalities.py",
    "distributed/test_equal_but_for_rounding.py",
    "faults/test_lost_process.py",
    "distributed/test_cluster_examples.py",
    "faults/test_disk_full.py",
    "faults/test_machines.py",
    "integrations/test_two_line_adoption.py",
)
"""Files with more than a minute of slow tests, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: a worker that begins one last leaves the other cores idle for minutes."""
    tests = Path(__file__).parent
    order = {tests / name: place for place, name in enumerate(LONGEST)}
    if gone := [str(path) for path in order if not path.exists()]:
        raise pytest.UsageError(f"LONGEST in tests/conftest.py names {', '.join(gone)}, which does not exist")
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through thousands of collected tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder of 32 small documents with enough structure to learn from."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for i in range(32):
        words = [rng.choice(WORDS[: 4 + j % 11]) for j in range(800)]
        (folder / f"{i:02}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(text, cache) -> TrainConfig:
    """A run of seconds: 24 steps of a LLaMA of a few thousand parameters."""
    return TrainConfig(
        steps=24,
        batch_size=4,
        log_every=2,
        eval_every=4,
        save_every=4,
        eval_tokens=512,
        report_to="none",
        device="cpu",
        model=ModelConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, vocab_size=300, context=16),
        data=DataConfig(data=str(text), cache=str(cache)),
        optim=OptimConfig(base_lr=1e-2, ratios="paper", warmup_fraction=0.1),
    )


@pytest.fixture
def tiny_gpt2(tiny) -> TrainConfig:
    return replace(tiny, model=replace(tiny.model, family="gpt2", kv_heads=None, tied=True))
