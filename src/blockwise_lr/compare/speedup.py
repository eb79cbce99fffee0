"""The loss gap and two measures of speed-up, with their uncertainty over paired seeds.

All functions are pure functions of numbers. A diverged run has a loss of +inf, and every value that depends on it is
None. A value that is None for another cause comes with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from blockwise_lr.extras import explained

try:
    from scipy import stats
except ModuleNotFoundError as error:
    raise explained(error, "compare needs") from None

Bound = Literal["exact", "at_least", "at_most"]


@dataclass(frozen=True)
class SpeedUp:
    """How many steps the baseline needs for the arm's loss, in units of the arm's N steps.

    `value` and `bound` are None if a run that they depend on diverged, or if the baseline's losses determine no
    value; `reason` then says why.

    Args:
        value: the speed-up, or a bound on it.
        bound: "exact", or whether the true speed-up is "at_least" or "at_most" `value`.
        reason: why there is no value.
    """

    value: float | None
    bound: Bound | None
    reason: str | None = field(default=None, compare=False)


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


DIVERGED = "a run diverged"
ALL_EQUAL = "all seeds are equal to the precision of the losses, so the spread between seeds is unknown"
UNDEFINED = SpeedUp(None, None, DIVERGED)


def paper_speedup(steps: Sequence[float], losses: Sequence[float], target: float, n_steps: float) -> SpeedUp:
    """Return the speed-up as the paper measures it: (first step at which the 2N baseline reaches `target`) / N.

    The paper is "The Sharpness Disparity Principle in Transformers" (arXiv 2502.19002, ICML 2025). The loss curve is
    interpolated linearly between evaluated steps, and its first crossing counts.

    This measure favours the arm, because the learning rate of the 2N baseline is still high at that step. Even the
    baseline's own N-step run mostly scores above 1 by it. `decayed_speedup` does not have this bias.

    Args:
        steps: evaluated steps of the 2N run, strictly increasing.
        losses: validation loss at each of these steps, in nats per token.
        target: the arm's terminal validation loss after N steps; not finite if the arm diverged.
        n_steps: N.

    Returns:
        The speed-up with its bound. It is "at_least" the last step / N if the baseline never reaches `target`, and
        "at_most" the first evaluated step / N if the baseline is there already. It is undefined if the arm diverged.

    Raises:
        ValueError: there are no evaluated steps, the lengths differ, the steps do not increase, or a loss is not
            finite.

    Example:
        >>> found = paper_speedup([100, 200, 400], [4.0, 3.0, 2.0], target=2.5, n_steps=200)
        >>> found.value, found.bound
        (1.5, 'exact')
    """
    x, y = _curve(steps, losses)
    if not math.isfinite(target):
        return UNDEFINED
    if y[0] <= target:
        return SpeedUp(float(x[0] / n_steps), "at_most")
    crossing = _first_crossing(x, y, target)
    if crossing is None:
        return SpeedUp(float(x[-1] / n_steps), "at_least")
    return SpeedUp(crossing / n_steps, "exact")


def decayed_speedup(terminal_losses: Mapping[int, float], target: float, n_steps: float) -> SpeedUp:
    """Return the speed-up between fully decayed runs: (horizon at which a baseline would end at `target`) / N.

    Between the horizons that were trained, the baseline's terminal loss is interpolated linearly in the logarithm of
    the horizon. If noise makes the loss rise somewhere, the first crossing counts.

    Args:
        terminal_losses: {steps of a baseline run with its own full schedule: its terminal loss}, at least one.
        target: the arm's terminal validation loss after N steps; not finite if the arm diverged.
        n_steps: N.

    Returns:
        The speed-up with its bound. It is "at_most" the smallest horizon / N if even that baseline ends below
        `target`, and "at_least" the largest horizon / N if no baseline reaches it. It is undefined if the arm
        diverged. It is also undefined, with the reason, if no baseline reaches `target` and the longest one ends
        above a shorter one: a loss that rises with more steps gives no bound.

    Raises:
        ValueError: there are no horizons, or a loss is not finite.

    Example:
        >>> round(decayed_speedup({100: 3.0, 200: 2.0}, target=2.5, n_steps=100).value, 3)  # the root of 2
        1.414
    """
    horizons = sorted(terminal_losses)
    x, y = _curve(horizons, [terminal_losses[h] for h in horizons])
    if not math.isfinite(target):
        return UNDEFINED
    if y[0] < target:
        return SpeedUp(float(x[0] / n_steps), "at_most")
    if y[0] == target:
        return SpeedUp(float(x[0] / n_steps), "exact")
    crossing = _first_crossing(np.log(x), y, target)
    if crossing is None:
        lowest = int(y.argmin())
        if y[-1] > y[lowest]:
            return SpeedUp(
                None, None, f"the baseline ends higher after {x[-1]:,.0f} steps than after {x[lowest]:,.0f}"
            )
        return SpeedUp(float(x[-1] / n_steps), "at_least")
    return SpeedUp(math.exp(crossing) / n_steps, "exact")


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


def _curve(steps: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and losses as arrays, after checking them."""
    x, y = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(
            f"a loss curve needs one loss a step, at least one; got {x.size} steps and {y.size} losses"
        )
    if (np.diff(x) <= 0).any() or x[0] <= 0:
        raise ValueError(f"the steps of a loss curve must be positive and increasing; got {list(steps)}")
    if not np.isfinite(y).all():
        raise ValueError(
            f"the losses of a curve must be finite; got {list(losses)}: cut a diverged run off first"
        )
    return x, y


def _first_crossing(x: np.ndarray, y: np.ndarray, target: float) -> float | None:
    """Return where the piecewise linear curve first falls to `target`; None if it never does."""
    reached = np.flatnonzero(y <= target)
    if not len(reached):
        return None
    k = int(reached[0])
    fraction = (y[k - 1] - target) / (y[k - 1] - y[k])
    return float(x[k - 1] + fraction * (x[k] - x[k - 1]))
