"""How far from uniform the best ratios are: the power of `measured` that is best at each length of run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from comparison_tables import table, thousands
from tuned import HORIZONS, MODELS, Tuned, tokens_a_parameter


def best_exponent(losses: Sequence[float]) -> tuple[float, float] | None:
    """Return where a parabola through the losses of `measured` to the powers 0, 1/2 and 1 is lowest, and its value.

    None if the parabola has no lowest point.

    Example:
        >>> best_exponent([4.0, 3.75, 4.0])
        (0.5, 3.75)
    """
    uniform, half, whole = losses
    bend = 2 * (uniform - 2 * half + whole)
    if bend <= 0:
        return None
    slope = whole - uniform - bend
    exponent = -slope / (2 * bend)
    return exponent, uniform + slope * exponent + bend * exponent**2


def exponents(found: dict[tuple[str, int, str], Tuned]) -> dict[tuple[str, int], tuple[float, float]]:
    """Return the best exponent and the nats it wins, by shape and steps, where the three rules are tuned; at seed 0."""
    every = {}
    for shape in MODELS:
        for steps in HORIZONS:
            three = [found.get((shape, steps, rule)) for rule in ("uniform", "half", "measured")]
            losses = [each.losses[0] for each in three if each is not None]
            if len(losses) == 3 and (best := best_exponent(losses)) is not None:
                every[shape, steps] = (best[0], losses[0] - best[1])
    return every


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return intercept and slope of a least-squares line through (log10 of tokens a parameter, value)."""
    slope, intercept = np.polyfit([x for x, _ in points], [y for _, y in points], 1)
    return float(intercept), float(slope)


def exponents_table(found: dict[tuple[str, int, str], Tuned]) -> str:
    """The best exponent by model and horizon, and for the larger model what the smaller one's line predicts."""
    every = exponents(found)
    place = {key: math.log10(tokens_a_parameter(*key)) for key in every}
    small = [key for key in every if key[0] == "llama-600k"]
    lines = [fit([(place[key], every[key][i]) for key in small]) if len(small) > 1 else None for i in (0, 1)]
    rows = []
    for key, values in every.items():
        predicted = [
            "-" if line is None or key in small else f"{line[0] + line[1] * place[key]:+.2f}"
            for line in lines
        ]
        steps = thousands(key[1])
        tokens = f"{10 ** place[key]:.2g}"
        rows.append(
            [
                MODELS[key[0]],
                steps,
                tokens,
                f"{values[0]:.2f}",
                predicted[0],
                f"{values[1]:+.3f}",
                predicted[1],
            ]
        )
    header = ["model", "steps", "tokens a parameter", "best exponent", "predicted", "nats won", "predicted"]
    return table(header, rows)
