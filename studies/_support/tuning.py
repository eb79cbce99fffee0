"""The results of a study's runs, and which base learning rates and which ratios to try next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from blockwise_lr.tune.samplers import make_sampler
from blockwise_lr.tune.space import Point, Space

Arm = TypeVar("Arm", bound=Any)
"""A dataclass with `name`, `shape`, `base_lr`, `ratios`, `warmup` and `seed`, and whatever else its study has."""

MOST_RATES = 8  # a rule that needs more than three has begun at the wrong place
WARMUPS = (0.05, 0.15, 0.4, 0.6)
"""The warm-ups that may be tried, as shares of the run."""

_ROUND = 4  # trials that are proposed together, so that several processes can train them


@dataclass(frozen=True)
class Results:
    """The runs that have ended, by the name of their arm."""

    runs: Mapping[str, Mapping[str, Any]]

    def loss(self, arm: Arm) -> float | None:
        """Return the tune loss; infinite for a run that diverged, None for one that has not been made."""
        run = self.runs.get(arm.name)
        if run is None:
            return None
        return float("inf") if run["tune_loss"] is None else float(run["tune_loss"])

    def best(self, arms: Sequence[Arm]) -> Arm | None:
        """Return the arm with the lowest tune loss, or None while one of them has not been made."""
        losses = [self.loss(arm) for arm in arms]
        if any(loss is None for loss in losses):
            return None
        return min(zip(losses, arms), key=lambda pair: pair[0] or 0.0)[1]


def waiting(wanted: Iterable[Arm], results: Results, shapes: Sequence[str] = ()) -> list[Arm]:
    """Return the arms that have not been trained, each once, in order; only those of `shapes`, if any are named."""
    arms = {arm.name: arm for arm in wanted if not shapes or arm.shape in shapes}
    return [arm for name, arm in arms.items() if name not in results.runs]


def at_seeds(arm: Arm | None, seeds: Iterable[int]) -> list[Arm]:
    """Return an arm at each of the seeds; nothing while the arm is not known."""
    return [] if arm is None else [replace(arm, seed=seed) for seed in seeds]


def three_digits(value: float) -> float:
    """Round to three digits, so that equal rates are equal numbers."""
    return float(f"{value:.3g}")


def bracket(first: Arm, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs over base learning rates that are known to be needed, and the best once all of them have ended.

    The rates are a factor of sqrt 2 apart, begin at that of `first`, and end when the best has a worse one on both
    sides, or at MOST_RATES.
    """
    arms = [first, *(replace(first, base_lr=three_digits(first.base_lr * by)) for by in (2**-0.5, 2**0.5))]
    while (best := results.best(arms)) is not None and len(arms) < MOST_RATES:
        rates = sorted(arm.base_lr for arm in arms)
        if best.base_lr not in (rates[0], rates[-1]):
            break
        factor = 2**-0.5 if best.base_lr == rates[0] else 2**0.5
        arms.append(replace(first, base_lr=three_digits(best.base_lr * factor)))
    return arms, best


def tune_arm(first: Arm, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune the base learning rate and the warm-up, as far as they are known, and what was chosen.

    This is how a rule is tuned, at seed 0 and by its tune loss: base learning rates a factor of sqrt 2
    apart until the best has a worse one on both sides; at that rate the next shorter and longer of WARMUPS, until
    neither is better; and if the warm-up has changed, the base learning rates again.
    """
    arms, best = bracket(first, results)
    if best is None:
        return arms, None
    tried, best = _warmups(best, results)
    arms += tried
    if best is not None and best.warmup != first.warmup:
        tried, best = bracket(best, results)
        arms += tried
    return arms, best


def _warmups(first: Arm, results: Results) -> tuple[list[Arm], Arm | None]:
    arms, best = [first], first
    while True:
        place = WARMUPS.index(best.warmup)
        beside = [replace(best, warmup=warmup) for warmup in WARMUPS[max(0, place - 1) : place + 2]]
        if all(arm in arms for arm in beside):
            return arms, best
        arms += [arm for arm in beside if arm not in arms]
        found = results.best(arms)
        if found is None:
            return arms, None
        best = found


def search_from(
    start: Sequence[Arm],
    like: Arm,
    space: Space,
    trials: int,
    results: Results,
    *,
    first: Sequence[Arm] = (),
) -> tuple[list[Arm], Arm | None]:
    """Return the trials of a search for ratios, as far as they are known, and the best arm once all have ended.

    The trials follow from the results alone, whatever the order in which they end.

    Args:
        start: arms that have ended, at which the search begins. They are no trials, and can be the best.
        like: an arm with the settings of every trial, but for what is searched.
        space: the blocks whose ratios are searched, with the base learning rate and the warm-up.
        trials: how many arms to try.
        results: the runs that have ended.
        first: trials to begin with.
    """
    sampler = make_sampler("trust-region", space, seed=0)
    arms = list(first)
    for arm in (*start, *arms):
        if (loss := results.loss(arm)) is None:
            return arms, None
        sampler.tell(point_of(arm, space), loss, prior=True)
    while len(arms) < trials:
        points = [sampler.ask() for _ in range(_ROUND)]
        asked = [
            replace(like, base_lr=point.base_lr, ratios=point.ratios, warmup=point.warmup) for point in points
        ]
        arms += asked
        losses = [results.loss(arm) for arm in asked]
        for point, loss in zip(points, losses):
            if loss is None:
                return arms, None
            sampler.tell(point, loss)
    return arms, results.best([*start, *arms])


def point_of(arm: Arm, space: Space) -> Point:
    """Return where an arm lies in a space; a block that the arm does not name has ratio 1."""
    return Point(arm.base_lr, arm.warmup, {block: arm.ratios.get(block, 1.0) for block in space.blocks})
