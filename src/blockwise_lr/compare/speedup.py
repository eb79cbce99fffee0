"""The speed-up in both of its senses, and the loss gap, with their uncertainty over paired seeds.

Pure functions of numbers. A diverged run is a loss of +inf; whatever needs it is then None, never a number
that looks like a measurement. What is None for another cause than a diverged run says its reason.
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
    """How many times as long the baseline needs: `value` in units of N steps, and how `value` bounds the
    truth.

    `value` and `bound` are None where a run that it needs diverged, or where the baseline gives no number;
    `reason` then says why.
    """

    value: float | None
    bound: Bound | None
    reason: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SpeedUpOverSeeds:
    """A speed-up aggregated over seeds.

    `ci95` is None with one seed, where any seed is only bounded, and where all seeds have the same speed-up.
    `reason` says why there is no value, or no interval although there are several exact seeds.
    """

    value: float | None
    bound: Bound | None
    ci95: tuple[float, float] | None
    reason: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class LossGap:
    """Baseline's terminal loss minus the arm's, nats a token, paired by seed; positive = arm better.

    `ci95` and `p_value` are None with one seed, and where the gaps of all seeds are equal; `reason` then says so.
    """

    mean: float | None
    ci95: tuple[float, float] | None
    p_value: float | None
    reason: str | None = field(default=None, compare=False)

    @property
    def significant(self) -> bool | None:
        """Whether a two-sided paired t-test rejects "no difference" at 5 %; None where it cannot tell."""
        return None if self.p_value is None else self.p_value < 0.05


DIVERGED = "a run diverged"
ALL_EQUAL = (
    "all seeds are equal to the precision of the losses, so they say nothing of the spread between seeds"
)
UNDEFINED = SpeedUp(None, None, DIVERGED)


def paper_speedup(steps: Sequence[float], losses: Sequence[float], target: float, n_steps: float) -> SpeedUp:
    """Speed-up as the paper measures it: (first step at which the 2N baseline reaches `target`) / N.

    The curve is linear between evaluated steps and its first crossing counts. The baseline's learning rate
    is still high there, which flatters whatever is compared: even a baseline of N steps mostly scores above 1
    against its own 2N run (METHOD section 4; see `decayed_speedup`).

    Args:
        steps: evaluated steps of the 2N run, strictly increasing.
        losses: validation loss at each of them, in nats a token.
        target: the arm's terminal validation loss after N steps; not finite: the arm diverged.
        n_steps: N.

    Returns:
        "exact", "at_least" (the last step / N: never reached) or "at_most" (the first evaluated step / N:
        already there); undefined if the arm diverged.

    Raises:
        ValueError: no evaluated steps, unequal lengths, steps that do not increase, or a loss that is not
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
    """Speed-up between fully decayed runs: (horizon whose baseline would end at `target`) / N.

    The baseline's terminal loss is taken as linear in the logarithm of the horizon between the horizons
    that were run; where noise makes it rise somewhere, the first crossing counts.

    Args:
        terminal_losses: steps of a baseline run with its own full schedule -> its terminal loss; at least
            one.
        target: the arm's terminal validation loss after N steps; not finite: the arm diverged.
        n_steps: N.

    Returns:
        "exact"; "at_most" smallest horizon / N where even that baseline ends lower; "at_least" largest
        horizon / N where none does; undefined if the arm diverged. Also undefined, with the reason, if none
        does and the longest baseline ends above a shorter one: a baseline that rises with more steps bounds
        nothing.

    Raises:
        ValueError: no horizons, or a loss that is not finite.

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
    """Mean of the seeds' speed-ups with a t-based 95 % confidence interval; conservative where seeds are
    bounded.

    - All exact: the mean, "exact", with its interval (None for one seed).
    - Some "at_least": each of these enters with its bound, the smallest it can be, so the mean is "at_least".
    - Some "at_most" and none "at_least": the mean of the bounds is "at_most".
    - Both kinds: an "at_most" seed enters as 0, the smallest any speed-up can be, so the mean is "at_least".
    - Any undefined (a diverged run, a baseline that rises with more steps): undefined, with the reason.

    Where any seed is only bounded there is no interval, since it would be too narrow (three seeds at "at
    least 2" have no spread at all). Nor is there one where all seeds are equal.

    Raises:
        ValueError: no seeds.
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
    """Mean of baseline minus arm over paired seeds, its t-based 95 % interval and a two-sided paired t-test.

    Args:
        baseline: terminal validation loss of the baseline's run of each seed, in nats a token.
        arm: that of the arm's run of the same seeds in the same order.

    Returns:
        All None if any run diverged (loss not finite); with one seed the mean alone. The mean alone, too, where
        the gaps differ by less than float32 resolves in the losses: a t interval of width 0 would claim a
        certainty that equal gaps do not give. Only if every gap is exactly 0, the runs being the same, the
        interval is (0, 0).

    Raises:
        ValueError: unequal numbers of seeds, or none.

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
    """By how much differences of such values may differ and still be the same in float32."""
    return 2 * float(np.spacing(np.float32(max(map(abs, values)))))


def _why_undefined(per_seed: Sequence[SpeedUp]) -> str | None:
    """The reason of the first seed without a value, a diverged run before all others, and how many share it."""
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
    """Mean, its 95 % interval, and the p-value of the mean being 0.

    The latter two are None for one value and for values within `rounding` of each other; (0, 0) and 1 for zeros.
    """
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, None, None
    if not sample.any():  # the same runs
        return 0.0, (0.0, 0.0), 1.0
    if np.ptp(sample) <= rounding:
        return mean, None, None
    stderr = float(stats.sem(sample))
    half = float(stats.t.ppf(0.975, len(sample) - 1)) * stderr
    p_value = float(2 * stats.t.sf(abs(mean) / stderr, len(sample) - 1))
    return mean, (mean - half, mean + half), p_value


def _curve(steps: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
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
    """Where the piecewise linear curve first comes down to `target` from above; None if it never does."""
    reached = np.flatnonzero(y <= target)
    if not len(reached):
        return None
    k = int(reached[0])
    fraction = (y[k - 1] - target) / (y[k - 1] - y[k])
    return float(x[k - 1] + fraction * (x[k] - x[k - 1]))
