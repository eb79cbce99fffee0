"""What to train next: a queue that follows from the results so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from arms import RULES, Arm
from baseline import ADAMW, Changes, tune_baseline
from tuning import Results, at_seeds, search_from, three_digits, tune_arm, waiting

from blockwise_lr.tune.space import Space


@dataclass(frozen=True)
class MuonArm(Arm):
    """One training run with Muon: QK, VO and FFN by Muon, all else by AdamW.

    Args:
        momentum: Muon's.
    """

    optimizer: str = "muon"
    momentum: float = 0.95


SHAPE = "llama-600k"
HORIZONS = (150, 600)
SEEDS = (0, 1, 2)
TRIALS = {150: 24, 600: 12}
SPACE = Space(["emb", "qk", "vo", "norm", "head"])
NOT_MATRICES = ("emb", "norm", "head")
"""What AdamW updates."""

MOST_SHARES = 8  # a search over one ratio that needs more has begun at the wrong place
_FIRST = {"uniform": 4e-3, "half": 2.8e-3, "measured": 1.4e-3}
"""The base learning rates to begin with at 150 steps; longer runs begin at the choice of the shorter, over sqrt 2."""

COMPARED = ("uniform", "two rates", "half", "measured")
BASELINE: Changes = {
    **ADAMW,
    "momentum 0.98": {"momentum": 0.98},
    "momentum 0.9": {"momentum": 0.9},
    "clipping at 1": {"clip": 1.0},
}
"""Further settings that are tried for "two rates"."""


def tuning(steps: int, rule: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune a rule at one horizon, as far as they are known, and what was chosen.

    "two rates", the baseline of people who train with Muon, is "uniform" with a learning rate of its own for all that
    AdamW updates: its ratio is tuned in factors of 2 until the best has a worse one on both sides, and the base
    learning rate again. Then the settings of BASELINE are tried.
    """
    if rule == "two rates":
        arms, best = two_rates(steps, results)
        if best is not None:
            more, best = tune_baseline(best, BASELINE, results)
            arms = [*arms, *more]
        return arms, best
    first = MuonArm(SHAPE, steps, _FIRST[rule], RULES[rule])
    if steps != HORIZONS[0]:
        shorter = tuning(HORIZONS[0], rule, results)[1]
        if shorter is None:
            return [], None
        first = replace(shorter, steps=steps, base_lr=three_digits(shorter.base_lr * 2**-0.5))
    return tune_arm(first, results)


def two_rates(steps: int, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune both learning rates and the warm-up, as far as they are known, and the choice."""
    first = tuning(steps, "uniform", results)[1]
    if first is None:
        return [], None
    arms = [first, *(_with_ratio(first, ratio) for ratio in (0.5, 2.0))]
    while (best := results.best(arms)) is not None and len(arms) < MOST_SHARES:
        ratios = sorted(_ratio(arm) for arm in arms)
        if _ratio(best) not in (ratios[0], ratios[-1]):
            break
        arms.append(_with_ratio(first, _ratio(best) * (0.5 if _ratio(best) == ratios[0] else 2.0)))
    if best is None:
        return arms, None
    again, best = tune_arm(best, results)
    return [*arms, *again], best


def _ratio(arm: Arm) -> float:
    return arm.ratios.get("emb", 1.0)


def _with_ratio(arm: Arm, ratio: float) -> Arm:
    return arm if ratio == 1 else replace(arm, ratios=dict.fromkeys(NOT_MATRICES, ratio))


def starts(steps: int, results: Results) -> list[Arm]:
    """Return the tuned rates at which a search begins, as far as known, with the decay and momentum of its trials."""
    found = [
        (two_rates(steps, results) if rule == "two rates" else tuning(steps, rule, results))[1]
        for rule in COMPARED
    ]
    return [arm for arm in found if arm is not None]


def search(steps: int, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the trials of the search for ratios at one horizon, as far as they are known, and the best arm.

    It begins at the tuned rates of COMPARED, and at the longer horizon at the best of the shorter one's search, too.
    """
    start = starts(steps, results)
    if len(start) < len(COMPARED):
        return [], None
    first: list[Arm] = []
    if steps != HORIZONS[0]:
        shorter = search(HORIZONS[0], results)[1]
        if shorter is None:
            return [], None
        first.append(replace(shorter, steps=steps, base_lr=three_digits(shorter.base_lr * 2**-0.5)))
    return search_from(start, MuonArm(SHAPE, steps, 1.0), SPACE, TRIALS[steps], results, first=first)


def _wanted(results: Results) -> Iterator[Arm]:
    for steps in HORIZONS:
        for rule in COMPARED:
            yield from tuning(steps, rule, results)[0]
        for rule in COMPARED:
            yield from at_seeds(tuning(steps, rule, results)[1], SEEDS[1:])
    for steps in HORIZONS:
        arms, best = search(steps, results)
        yield from arms
        yield from at_seeds(best, SEEDS[1:])


def queue(results: Results, shapes: Sequence[str] = ()) -> list[Arm]:
    """Return the arms that are still to be trained and follow from the results so far, in order.

    Args:
        results: the runs that have ended.
        shapes: unused: there is one model.
    """
    return waiting(_wanted(results), results)
