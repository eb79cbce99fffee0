"""The ratios that the smaller model's runs predict for a model and a length of run that they do not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from arms import Arm, power
from rules import settled
from shapes import CONTEXT
from tuning import Results, tune_arm

from blockwise_lr.optim.ratios import MEASURED_RATIOS

PARAMETERS = {"llama-600k": 655_936, "llama-2m": 1_836_160}
TOKENS_A_STEP = 16 * CONTEXT
FITTED = (("llama-600k", 300), ("llama-600k", 1200), ("llama-600k", 4800))
UNUSED = ("llama-2m", 1200)
"""A size that is in no fit."""

PREDICTED = "predicted"
"""The name of `measured` to the power that is predicted for UNUSED."""


def tokens_a_parameter(shape: str, steps: int) -> float:
    """Return the tokens that a run reads over the model's parameters."""
    return steps * TOKENS_A_STEP / PARAMETERS[shape]


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


def exponent(shape: str, steps: int, results: Results) -> tuple[float, float] | None:
    """Return the best exponent and the nats of val loss it wins, at seed 0; None: the three rules are not tuned yet."""
    arms = [settled(shape, steps, rule, results) for rule in ("uniform", "half", "measured")]
    losses = [
        results.runs[arm.name]["val_loss"] for arm in arms if arm is not None and arm.name in results.runs
    ]
    if len(losses) < len(arms) or (best := best_exponent(losses)) is None:
        return None
    return best[0], losses[0] - best[1]


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return intercept and slope of a least-squares line through (log10 of tokens a parameter, value)."""
    slope, intercept = np.polyfit([x for x, _ in points], [y for _, y in points], 1)
    return float(intercept), float(slope)


def lines(every: Mapping[tuple[str, int], tuple[float, float]]) -> list[tuple[float, float]] | None:
    """Return the lines of the exponent and of the nats won through the runs of FITTED; None: fewer than two exist."""
    known = [key for key in FITTED if key in every]
    if len(known) < 2:
        return None
    return [fit([(math.log10(tokens_a_parameter(*key)), every[key][i]) for key in known]) for i in (0, 1)]


def predicted(results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune `measured` to the power that is predicted for UNUSED, and what was chosen.

    There are none before the exponent is known at all of FITTED and `half` is tuned at UNUSED, where they begin.
    """
    every = {key: found for key in FITTED if (found := exponent(*key, results)) is not None}
    half = settled(*UNUSED, "half", results)
    line = lines(every)
    if len(every) < len(FITTED) or line is None or half is None:
        return [], None
    best = line[0][0] + line[0][1] * math.log10(tokens_a_parameter(*UNUSED))
    ratios = power(MEASURED_RATIOS, round(best, 2))
    return tune_arm(Arm(*UNUSED, half.base_lr, ratios, half.warmup), results)
