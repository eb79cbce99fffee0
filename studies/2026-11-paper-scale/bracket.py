"""Find the best base learning rate by doubling and halving."""

from __future__ import annotations

import math
from collections.abc import Callable

FACTOR = 2.0


def bracket(first: float, loss_at: Callable[[float], float | None], most: int = 8) -> float | None:
    """Double or halve the rate until a worse one lies on both sides of the best.

    Args:
        first: the rate to begin with; the next one is twice as high.
        loss_at: the loss at a rate; not a number: the run diverged; None: there is no time left for it.
        most: the highest number of rates to try.

    Returns:
        The rate with the lowest loss; None if no run ended.

    Example:
        >>> bracket(1.0, lambda rate: abs(rate - 0.3))
        0.25
    """
    losses: dict[int, float] = {}  # by the number of doublings

    def tried(power: int) -> bool:
        loss = loss_at(first * FACTOR**power)
        if loss is not None:
            losses[power] = math.inf if math.isnan(loss) else loss
        return loss is not None

    going = tried(0) and tried(1)
    while going and len(losses) < most:
        best = min(losses, key=lambda power: (losses[power], power))
        beside = [power for power in (best + 1, best - 1) if power not in losses]
        going = bool(beside) and tried(beside[0])
    return first * FACTOR ** min(losses, key=lambda power: (losses[power], power)) if losses else None
