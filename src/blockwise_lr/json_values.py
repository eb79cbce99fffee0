"""Values out of a report's JSON, of the type that the report is written with."""

from __future__ import annotations

import math
from typing import Any, TypeVar

T = TypeVar("T")


def typed(value: Any, kind: type[T]) -> T:
    """`value`, if it is of that type (True is no int). Raises TypeError."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r:.50} is {type(value).__name__}, expected {kind.__name__}")
    return value


def number(value: Any) -> float:
    """A finite float. Raises TypeError, ValueError, OverflowError."""
    if not math.isfinite(found := float(value if isinstance(value, float) else typed(value, int))):
        raise ValueError(f"{value!r} is not finite")
    return found


def number_or_nan(value: Any) -> float:
    """The same; null is NaN, as reports write it."""
    return math.nan if value is None else number(value)


def numbers(values: Any) -> list[float]:
    """A list of finite floats."""
    return [number(value) for value in typed(values, list)]
