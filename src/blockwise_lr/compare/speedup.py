"""Two measures of one run's speed-up over the baseline.

All functions are pure functions of numbers. A diverged run has a loss of +inf, and every value that depends on it is
None. A value that is None for another cause comes with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

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


DIVERGED = "a run diverged"
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
