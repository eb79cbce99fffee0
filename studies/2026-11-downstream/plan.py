"""What to train next: the tuned rules at equal steps, and uniform for as long as it needs for the loss of `half`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "2026-11-horizon"))

from arms import Arm
from rules import settled
from text_runs import load
from tuning import Results, at_seeds, three_digits, waiting

SHAPE, STEPS = "llama-600k", 1200
SEEDS = (0, 1, 2)
COMPARED = ("uniform", "half", "measured")
LADDER = (1500, 1800, 2400, 3600, 4800)
"""Lengths of uniform runs, tried in turn at seed 0 until the tune loss is that of `half`."""

TOLERANCE = 0.003
"""Nats of tune loss, in the mean over the seeds, within which two losses count as equal."""

MOST_LENGTHS = 3
"""How many lengths are trained at all seeds to come within TOLERANCE."""

HORIZON = Path(__file__).parents[1] / "2026-11-horizon"


def chosen(rule: str, tuning_runs: Results) -> Arm | None:
    """Return what the horizon study chose for a rule at this length; None while it is not tuned there."""
    return settled(SHAPE, STEPS, rule, tuning_runs)


def at_length(arm: Arm, steps: int) -> Arm:
    """Return the arm over more steps; four times the steps have a base learning rate over sqrt 2."""
    return replace(arm, steps=steps, base_lr=three_digits(arm.base_lr * (arm.steps / steps) ** 0.25))


def between(one: tuple[int, float], other: tuple[int, float], loss: float) -> int:
    """Return the steps at which a line through two (steps, loss), in the logarithm of the steps, has a loss.

    Example:
        >>> between((1000, 4.0), (4000, 3.0), 3.5)
        2000
    """
    share = (loss - one[1]) / (other[1] - one[1])
    return round(one[0] * (other[0] / one[0]) ** share / 10) * 10


def ladder(uniform: Arm, half: Arm, results: Results) -> tuple[list[Arm], int | None]:
    """Return the uniform runs at seed 0 that are known to be needed, and the length at which the losses are equal.

    The length is None while it is not known, and where the longest run of LADDER does not suffice.
    """
    arms = [uniform]
    target = results.loss(half)
    for steps in (*LADDER, None):
        loss = results.loss(arms[-1])
        if loss is None or target is None:
            return arms, None
        if loss <= target:
            break
        if steps is None:
            return arms, None
        arms.append(at_length(uniform, steps))
    if len(arms) == 1:
        return arms, uniform.steps
    points = [(arm.steps, results.loss(arm) or 0.0) for arm in arms[-2:]]
    return arms, between(points[0], points[1], target)


def mean_loss(arm: Arm, results: Results) -> float | None:
    """Return the tune loss over all seeds; None while one of them has not been trained."""
    losses = [results.loss(each) for each in at_seeds(arm, SEEDS)]
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if len(known) == len(losses) else None


def equal_loss(uniform: Arm, half: Arm, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the uniform runs for the loss of `half`, as far as they are known, and the one that is closest.

    The first length is that of `ladder`. A length that misses by more than TOLERANCE is followed by the one at which
    the line through its mean loss and that of the tuned uniform run has the loss of `half`.
    """
    arms, steps = ladder(uniform, half, results)
    if steps is None:
        return arms, None
    target, start = mean_loss(half, results), mean_loss(uniform, results)
    tried: dict[int, float] = {}
    while steps is not None and steps not in tried and len(tried) < MOST_LENGTHS:
        arm = at_length(uniform, steps)
        arms += at_seeds(arm, SEEDS)
        loss = mean_loss(arm, results)
        if loss is None or target is None or start is None:
            return arms, None
        tried[steps] = loss
        sloped = loss < start and math.isfinite(loss)
        done = abs(loss - target) <= TOLERANCE or steps == uniform.steps or not sloped
        steps = None if done else between((uniform.steps, start), (steps, loss), target)
    return arms, at_length(uniform, min(tried, key=lambda n: abs(tried[n] - (target or 0.0))))


def models(results: Results, tuning_runs: Results) -> dict[str, Arm]:
    """Return the arms that are compared, at seed 0, by the name that tables give them."""
    found = {rule: arm for rule in COMPARED if (arm := chosen(rule, tuning_runs)) is not None}
    if "uniform" in found and "half" in found:
        longer = equal_loss(found["uniform"], found["half"], results)[1]
        if longer is not None and longer.steps != STEPS:
            found["uniform, longer"] = longer
    return found


def _wanted(results: Results, tuning_runs: Results) -> Iterator[Arm]:
    found = {rule: arm for rule in COMPARED if (arm := chosen(rule, tuning_runs)) is not None}
    for seed in SEEDS:
        yield from (replace(arm, seed=seed) for arm in found.values())
    if "uniform" in found and "half" in found:
        yield from equal_loss(found["uniform"], found["half"], results)[0]


def queue(results: Results, shapes: Sequence[str] = (), tuning_runs: Results | None = None) -> list[Arm]:
    """Return the arms that are still to be trained and follow from the results so far, in order.

    Args:
        results: the runs of this study that have ended.
        shapes: not used; this study has one model.
        tuning_runs: the runs of the horizon study; None: read them from its folder.
    """
    tuning_runs = load(HORIZON / "data" / "runs") if tuning_runs is None else tuning_runs
    return waiting(_wanted(results, tuning_runs), results)
