"""What one arm wins over another on the same items, with intervals over items and over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gaps import gap

from blockwise_lr.compare.over_seeds import LossGap

Values = Mapping[int, npt.NDArray[np.float64]]
"""One number an item, by seed: 1 for right and 0 for wrong, or a log-likelihood."""


@dataclass(frozen=True)
class Paired:
    """A difference of means: positive where the arm is above the baseline.

    Args:
        mean: over items and over the seeds that both have.
        items95: 95 % interval if other items were drawn: the seeds stay as they are.
        seeds: the differences by seed, with an interval if other seeds were drawn.
    """

    mean: float
    items95: tuple[float, float]
    seeds: LossGap


def values(score: Mapping[str, Any], kind: str) -> npt.NDArray[np.float64]:
    """Return one number an item from what score.py wrote, `kind` being acc, acc_norm or log_likelihood."""
    found = score[kind]
    return np.array([float(one) for one in found])


def paired(baseline: Values, other: Values) -> Paired:
    """Compare two arms by item: the difference of every item is averaged over the seeds first."""
    seeds = sorted(baseline.keys() & other.keys())
    by_item = np.mean([other[seed] - baseline[seed] for seed in seeds], axis=0)
    mean = float(by_item.mean())
    reach = 1.96 * float(by_item.std(ddof=1)) / len(by_item) ** 0.5
    # A gap is positive where the second is lower, so accuracies change their sign.
    over = gap(
        {seed: -float(baseline[seed].mean()) for seed in seeds},
        {seed: -float(other[seed].mean()) for seed in seeds},
    )
    return Paired(mean, (mean - reach, mean + reach), over)


def standard_error(own: Values) -> float:
    """Return the standard error of an arm's mean over items, each averaged over the seeds."""
    by_item = np.mean(list(own.values()), axis=0)
    return float(by_item.std(ddof=1)) / float(len(by_item)) ** 0.5
