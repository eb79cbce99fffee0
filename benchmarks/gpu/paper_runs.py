"""The runs of LLaMA-134M, the most telling first, and how many of them fit into a time. Imports no torch."""

from __future__ import annotations

RUNS = (
    # With nothing else changed: at uniform's best base learning rate and warm-up over 1 000 steps.
    "half:1.2e-3:0.2:1000",
    "emb=16:1.2e-3:0.2:1000",
    # At the lower of the two rates that uniform was trained with there, and at a higher one.
    "emb=16:8.5e-4:0.2:1000",
    "half:8.5e-4:0.2:1000",
    "uniform:1.7e-3:0.2:1000",
    "uniform:1.2e-3:0.2:2000",
    "half:1.2e-3:0.2:2000",
    "emb=16:1.2e-3:0.2:2000",
    "measured:3e-4:0.15:2000",
)
"""RATIOS:BASE_LR:WARM_UP:STEPS, as studies/2026-11-paper-scale/train.py takes them."""
COMPILING = 45
"""Seconds before the first run: imports and compiling."""


def seconds(run: str) -> int:
    """Return the estimate for one run on one H100 or H200."""
    return 55 * int(run.rpartition(":")[2]) // 1000


SECONDS = COMPILING + sum(map(seconds, RUNS))
LEAST_SECONDS = COMPILING + seconds(RUNS[0])


def that_fit(time: float) -> tuple[int, int]:
    """Return how many runs fit into `time` seconds, and after how many seconds the last of them ends."""
    end = COMPILING
    for number, run in enumerate(RUNS):
        if end + seconds(run) > time:
            return number, end
        end += seconds(run)
    return len(RUNS), end
