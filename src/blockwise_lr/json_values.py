"""Read values of a report's JSON, with checks of their types."""

from __future__ import annotations

import math
from typing import Any, TypeVar

T = TypeVar("T")


def typed(value: Any, kind: type[T]) -> T:
    """Return `value` if it has the type `kind`. A bool does not count as an int.

    Raises:
        TypeError: `value` has another type.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r:.50} is {type(value).__name__}, expected {kind.__name__}")
    return value


def number(value: Any) -> float:
    """Return a number as a finite float.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is NaN or infinite.
        OverflowError: `value` is an integer too large for a float.
    """
    if not math.isfinite(found := float(value if isinstance(value, float) else typed(value, int))):
        raise ValueError(f"{value!r} is not finite")
    return found


def number_or_nan(value: Any) -> float:
    """Return a number as a finite float, or NaN for None, because reports write NaN as null."""
    return math.nan if value is None else number(value)


def numbers(values: Any) -> list[float]:
    """Return a list of numbers as finite floats. Raises as :func:`number`."""
    return [number(value) for value in typed(values, list)]
