"""The results of a study's runs, and which base learning rates to try next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arms import Arm

MOST_RATES = 6  # a rule that needs more than three has begun at the wrong place


@dataclass(frozen=True)
class Results:
    """The runs that have ended, by the name of their arm."""

    runs: Mapping[str, Mapping[str, Any]]

    def loss(self, arm: Arm) -> float | None:
        """Return the tune loss; infinite for a run that diverged, None for one that has not been made."""
        run = self.runs.get(arm.name)
        if run is None:
            return None
        return float("inf") if run["tune_loss"] is None else float(run["tune_loss"])

    def best(self, arms: Sequence[Arm]) -> Arm | None:
        """Return the arm with the lowest tune loss, or None while one of them has not been made."""
        losses = [self.loss(arm) for arm in arms]
        if any(loss is None for loss in losses):
            return None
        return min(zip(losses, arms), key=lambda pair: pair[0] or 0.0)[1]


def three_digits(value: float) -> float:
    """Round to three digits, so that equal rates are equal numbers."""
    return float(f"{value:.3g}")


def bracket(first: Arm, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs over base learning rates that are known to be needed, and the best once all of them have ended.

    The rates are a factor of sqrt 2 apart, begin at that of `first`, and end when the best has a worse one on both
    sides, or at MOST_RATES.
    """
    arms = [first, *(replace(first, base_lr=three_digits(first.base_lr * by)) for by in (2**-0.5, 2**0.5))]
    while (best := results.best(arms)) is not None and len(arms) < MOST_RATES:
        rates = sorted(arm.base_lr for arm in arms)
        if best.base_lr not in (rates[0], rates[-1]):
            break
        factor = 2**-0.5 if best.base_lr == rates[0] else 2**0.5
        arms.append(replace(first, base_lr=three_digits(best.base_lr * factor)))
    return arms, best
