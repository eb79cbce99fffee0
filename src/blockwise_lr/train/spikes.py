"""Detect loss spikes: logged losses far above the previous ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 20
_FEWEST = 5  # with fewer previous losses, nothing counts as a spike
_FAR = 6.0  # in standard deviations; normal noise exceeds it once in a billion losses
_SMALLEST = 0.005  # lower bound of the deviation as a fraction of the median, for curves almost without noise


def is_spike(loss: float | None, before: Sequence[float | None]) -> bool:
    """Return whether a loss is more than six standard deviations above the median of the last 20 losses.

    The deviation is estimated as 1.4826 times the median absolute deviation, so that one spike does not hide the next.
    It is at least 0.5 % of the median. Losses fall during training, so the median is a cautious reference.

    Args:
        loss: the loss of one row of metrics.jsonl; None for a non-finite loss, which `nonfinite_guard` handles.
        before: the losses of the previous rows; None for non-finite ones.

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
