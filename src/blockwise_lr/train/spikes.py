"""Loss spikes: a logged loss far above those before it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 20
_FEWEST = 5  # losses below which there is nothing to compare with
_FAR = 6.0  # standard deviations; of normal noise, one in a billion
_SMALLEST = 0.005  # of the median: a curve without any noise has no deviation to speak of


def is_spike(loss: float | None, before: Sequence[float | None]) -> bool:
    """Whether a loss is more than six standard deviations above the median of the last 20.

    The deviation is 1.4826 times the median absolute deviation, so that a spike among the 20 does not hide the next,
    and at least 0.5 % of the median. Losses fall in training, which makes the median a cautious reference.

    Args:
        loss: mean over a row of metrics.jsonl; None (it was not finite) is no spike but worse, and told elsewhere.
        before: those of the rows before it, None among them or not.

    Example:
        >>> is_spike(4.0, [3.0, 3.1, 2.9, 3.0, 3.0]), is_spike(3.05, [3.0, 3.1, 2.9, 3.0, 3.0])
        (True, False)
    """
    known = [value for value in before[-WINDOW:] if value is not None]
    if loss is None or len(known) < _FEWEST:
        return False
    median = statistics.median(known)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in known)
    return loss > median + _FAR * max(deviation, _SMALLEST * abs(median))
