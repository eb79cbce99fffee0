"""The length of a warm-up, given as a number of steps or as a fraction of the run."""

from __future__ import annotations

import math
from numbers import Real


def warmup_in_steps(warmup_steps: float, total_steps: int) -> float:
    """Return the length of the warm-up in steps.

    A number between 0 and 1 is a fraction of the run, rounded up to whole steps. transformers'
    ``TrainingArguments.warmup_steps`` has the same meaning since version 5.

    Args:
        warmup_steps: a number of steps, or a fraction of `total_steps` between 0 and 1.
        total_steps: number of optimizer steps in the run.

    Raises:
        ValueError: warmup_steps is not a number.

    Example:
        >>> warmup_in_steps(0.1, 50), warmup_in_steps(10, 50)
        (5, 10)
    """
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, Real):
        raise ValueError(
            f"warmup_steps is {warmup_steps!r}; expected a number of steps, or a share of the run between 0 and 1"
        )
    return math.ceil(warmup_steps * total_steps) if 0 < warmup_steps < 1 else warmup_steps
