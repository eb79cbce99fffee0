"""The numbers of a schedule: its length, and that of its warm-up as a number of steps or a fraction of the run."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from blockwise_lr.arguments import check_number


def plain_number(value: Any, name: str, example: str) -> Any:
    """Return a number as an int or a float of Python, so that ``torch.load`` accepts it with ``weights_only``.

    Args:
        value: the argument that the user passed; numpy's numbers are accepted.
        name: the argument's name.
        example: a value for the message, such as "1000".

    Raises:
        TypeError: `value` is no number.

    Example:
        >>> plain_number(10, "total_steps", "1000"), plain_number(0.5, "floor", "3e-5")
        (10, 0.5)
    """
    number = check_number(value, name, example)
    return int(value) if isinstance(value, Integral) else number


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
    if 0 < warmup_steps < 1:
        return math.ceil(warmup_steps * total_steps)
    return plain_number(warmup_steps, "warmup_steps", "100")
