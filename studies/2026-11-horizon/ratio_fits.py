"""A line for each block's searched ratio against the length of the run, with what its valley leaves open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from comparison_tables import table
from found_ratios import Found
from prediction import tokens_a_parameter
from rules import SPACE
from searched import searches
from tuned import Tuned
from tuning import Results

_UNKNOWN = 2.0  # on a log2 scale: a ratio whose valley is not bounded may move by a factor of 4


@dataclass(frozen=True)
class Line:
    """A weighted least-squares line of the log2 of a ratio.

    Args:
        slope: change of log2 of the ratio where the variable grows by a factor of 4.
        error: of the slope, if each ratio can move by half of its valley.
        residual: root mean square of what the line leaves, on a log2 scale.
    """

    slope: float
    error: float
    residual: float


def line(points: Sequence[tuple[float, float, float]]) -> Line:
    """Return the line through points of (variable, ratio, half of its valley on a log2 scale)."""
    x = np.array([math.log(value, 4) for value, _, _ in points])
    y = np.array([math.log2(ratio) for _, ratio, _ in points])
    weights = [1 / width for _, _, width in points]
    found, covariance = np.polyfit(x, y, 1, w=weights, cov="unscaled")
    residual = np.sqrt(((y - np.polyval(found, x)) ** 2).mean())
    return Line(float(found[0]), float(covariance[0, 0] ** 0.5), float(residual))


def ratio_fits_table(found: Mapping[tuple[str, int, str], Tuned], results: Results) -> str:
    """One row a block: how its ratio moves with the tokens a parameter, and with the base learning rate times steps."""
    every = searches(dict(found), results)
    header = [
        "block",
        "log2 of the ratio, per factor of 4 in steps",
        "decided",
        "residual",
        "residual in rate x steps",
    ]
    rows = []
    for block in SPACE.blocks if len(every) > 1 else ():
        by_tokens = line([(tokens_a_parameter(*key), *_width(each, block)) for key, each in every.items()])
        by_rate = line([(each.best.base_lr * key[1], *_width(each, block)) for key, each in every.items()])
        decided = "yes" if abs(by_tokens.slope) > 2 * by_tokens.error else "no"
        slope = f"{by_tokens.slope:+.2f} ± {by_tokens.error:.2f}"
        rows.append([block.upper(), slope, decided, f"{by_tokens.residual:.2f}", f"{by_rate.residual:.2f}"])
    return table(header, rows)


def _width(each: Found, block: str) -> tuple[float, float]:
    """Return a block's ratio, and half of the width of its valley on a log2 scale."""
    ratio, between = each.ratio(block)
    return ratio, _UNKNOWN if between is None else math.log2(between[1] / between[0]) / 2
