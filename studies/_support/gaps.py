"""What one arm wins over another at equal seeds, and how a table shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from arms import Arm
from tuning import Results

from blockwise_lr.compare.over_seeds import LossGap, loss_gap


def losses(arm: Arm, results: Results, seeds: Iterable[int]) -> dict[int, float]:
    """Return the val loss of an arm by seed, of the seeds that have been trained; infinite for a run that diverged."""
    names = {seed: replace(arm, seed=seed).name for seed in seeds}
    return {
        seed: float("inf") if (loss := results.runs[name]["val_loss"]) is None else float(loss)
        for seed, name in names.items()
        if name in results.runs
    }


def gap(baseline: Mapping[int, float], other: Mapping[int, float]) -> LossGap:
    """Return the nats won over the baseline, over the seeds that both have; losses are by seed."""
    both = sorted(baseline.keys() & other.keys())
    return loss_gap([baseline[seed] for seed in both], [other[seed] for seed in both])


def gap_cell(found: LossGap, seeds: int) -> str:
    """Return a cell such as "+0.123 (+0.101 to +0.145)"; with one seed it has no interval and says so.

    Example:
        >>> gap_cell(gap({0: 3.5}, {0: 3.4}), 1)
        '+0.100 (one seed)'
    """
    if found.mean is None:
        return "diverged"
    if found.ci95 is None:
        return f"{found.mean:+.3f} (one seed)" if seeds == 1 else f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} ({found.ci95[0]:+.3f} to {found.ci95[1]:+.3f})"
