"""Estimate: one number of a report with its standard error."""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """Average sharpness per parameter, S(b) = tr(H_b) / #(b).

    Args:
        mean: the estimate.
        stderr: its standard error; NaN where there was a single draw.
        numel: #(b), number of elements.
    """

    mean: float
    stderr: float
    numel: int
