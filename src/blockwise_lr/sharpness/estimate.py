"""Estimate: one number of a report, with its standard error."""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """The average sharpness per parameter of one block, layer or parameter: S(b) = tr(H_b) / #(b).

    Args:
        mean: the estimate.
        stderr: its standard error; NaN if there was a single draw.
        numel: #(b), the number of elements.
    """

    mean: float
    stderr: float
    numel: int
