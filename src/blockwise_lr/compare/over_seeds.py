"""Means over paired seeds with their uncertainty: of speed-ups, and of the loss gap.

All functions are pure functions of numbers. A value that depends on a diverged run is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from blockwise_lr.extras import explained

try:
    from scipy import stats
except ModuleNotFoundError as error:
    raise explained(error, "compare needs") from None

from blockwise_lr.compare.speedup import DIVERGED, Bound, SpeedUp


@dataclass(frozen=True)
class SpeedUpOverSeeds:
    """A speed-up aggregated over seeds.

    Args:
        value: the mean over seeds, or a bound on it.
        bound: "exact", or whether the true mean is "at_least" or "at_most" `value`.
        ci95: 95 % confidence interval. None with one seed, if any seed is only bounded, or if all seeds are equal.
        reason: why there is no value, or no interval although there are several exact seeds.
    """

    value: float | None
    bound: Bound | None
    ci95: tuple[float, float] | None
    reason: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class LossGap:
    """The baseline's terminal loss minus the arm's in nats per token, paired by seed. Positive: the arm is better.

    Args:
        mean: the mean over seeds; None if a run diverged.
        ci95: 95 % confidence interval. None with one seed, or if the gaps of all seeds are equal but not all 0.
        p_value: p-value of a two-sided paired t-test; None where `ci95` is None.
        reason: why a value is missing.
    """

    mean: float | None
    ci95: tuple[float, float] | None
    p_value: float | None
    reason: str | None = field(default=None, compare=False)

    @property
    def significant(self) -> bool | None:
        """Whether the paired t-test rejects "no difference" at 5 %; None if there is no p-value."""
        return None if self.p_value is None else self.p_value < 0.05


ALL_EQUAL = "all seeds are equal to the precision of the losses, so the spread between seeds is unknown"


def speedup_over_seeds(per_seed: Sequence[SpeedUp]) -> SpeedUpOverSeeds:
    """Return the mean speed-up over seeds with a t-based 95 % confidence interval.

    If some seeds are only bounded, the mean is a conservative bound:

    - All "exact": the mean is "exact" and has an interval (None for one seed).
    - Some "at_least": each enters with its bound, its smallest possible value, so the mean is "at_least".
    - Some "at_most" and none "at_least": the mean of the bounds is "at_most".
    - Both kinds: an "at_most" seed enters as 0, the smallest possible speed-up, so the mean is "at_least".
    - Any undefined (a diverged run, a baseline that rises with more steps): undefined, with the reason.

    There is no interval if any seed is only bounded, since it would be too narrow: three seeds at "at least 2" have no
    spread at all. There is none either if all seeds are equal.

    Args:
        per_seed: the speed-up of each seed.

    Raises:
        ValueError: `per_seed` is empty.
    """
    if not per_seed:
        raise ValueError("speedup_over_seeds got no seeds; expected at least one speed-up")
    values = [s.value for s in per_seed if s.value is not None]
    if len(values) < len(per_seed):
        return SpeedUpOverSeeds(None, None, None, _why_undefined(per_seed))
    bounds = {s.bound for s in per_seed}
    if bounds == {"exact"}:
        mean, ci95, _ = _t_interval(values, _rounding(values))
        return SpeedUpOverSeeds(mean, "exact", ci95, _why_no_interval(values, ci95))
    if "at_least" not in bounds:
        return SpeedUpOverSeeds(float(np.mean(values)), "at_most", None)
    if "at_most" in bounds:
        values = [0.0 if s.bound == "at_most" else v for s, v in zip(per_seed, values)]
    return SpeedUpOverSeeds(float(np.mean(values)), "at_least", None)


def loss_gap(baseline: Sequence[float], arm: Sequence[float]) -> LossGap:
    """Return the mean loss gap over paired seeds, its t-based 95 % interval and a two-sided paired t-test.

    Args:
        baseline: terminal validation loss of the baseline for each seed, in nats per token.
        arm: terminal validation loss of the arm for the same seeds in the same order.

    Returns:
        The mean, interval and p-value; all None if a run diverged (its loss is not finite). There is only a mean with
        one seed, and if the gaps differ by less than the float32 resolution of the losses, because an interval of
        width 0 would claim a false certainty. If every gap is exactly 0, the runs are the same and the interval is
        (0, 0).

    Raises:
        ValueError: the numbers of seeds differ, or there are none.

    Example:
        >>> gap = loss_gap([3.0, 3.1, 3.2], [2.9, 3.01, 3.1])
        >>> round(gap.mean, 3), gap.significant
        (0.097, True)
    """
    if len(baseline) != len(arm) or not baseline:
        raise ValueError(
            f"loss_gap pairs runs by seed: got {len(baseline)} baseline and {len(arm)} arm losses; "
            f"expected the same number of each, at least one"
        )
    if not np.isfinite([*baseline, *arm]).all():
        return LossGap(None, None, None, DIVERGED)
    gaps = np.subtract(baseline, arm)
    mean, ci95, p_value = _t_interval(gaps, _rounding([*baseline, *arm]))
    return LossGap(mean, ci95, p_value, _why_no_interval(gaps, ci95))


def _rounding(values: Sequence[float]) -> float:
    """Return how far differences of such values can be apart when they are equal up to float32 rounding."""
    return 2 * float(np.spacing(np.float32(max(map(abs, values)))))


def _why_undefined(per_seed: Sequence[SpeedUp]) -> str | None:
    """Return the reason of the first seed without a value, preferring a diverged run, and the number of such seeds."""
    reasons = [s.reason or DIVERGED for s in per_seed if s.value is None]
    reason = DIVERGED if DIVERGED in reasons else reasons[0]
    if len(per_seed) == 1:
        return reason
    return f"{reason} ({len(reasons)} of {len(per_seed)} seeds)"


def _why_no_interval(values: Sequence[float] | np.ndarray, ci95: object) -> str | None:
    return ALL_EQUAL if len(values) > 1 and ci95 is None else None


def _t_interval(
    values: Sequence[float] | np.ndarray, rounding: float
) -> tuple[float, tuple[float, float] | None, float | None]:
    """Return the mean, its 95 % interval, and the p-value of a mean of 0.

    The interval and the p-value are None for one value and for values within `rounding` of each other. If all values
    are 0, they are (0, 0) and 1.
    """
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, None, None
    if not sample.any():  # the runs are the same
        return 0.0, (0.0, 0.0), 1.0
    if np.ptp(sample) <= rounding:
        return mean, None, None
    stderr = float(stats.sem(sample))
    half = float(stats.t.ppf(0.975, len(sample) - 1)) * stderr
    p_value = float(2 * stats.t.sf(abs(mean) / stderr, len(sample) - 1))
    return mean, (mean - half, mean + half), p_value
