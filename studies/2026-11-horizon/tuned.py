"""The rules whose tuning has ended: their losses, what they win over uniform, and how much faster they are."""

from __future__ import annotations

from dataclasses import dataclass

from arms import Arm
from gaps import losses
from prediction import PREDICTED, UNUSED, predicted
from rules import COMPARED, EMBEDDING, LONGEST, SEARCHES, SEEDS, search, settled, unchanged
from tuning import Results

from blockwise_lr.compare.over_seeds import SpeedUpOverSeeds, speedup_over_seeds
from blockwise_lr.compare.speedup import decayed_speedup

MODELS = {"llama-600k": "0.6M", "llama-2m": "1.8M"}
HORIZONS = tuple(SEEDS)
SEARCHED = "searched"
"""The name, beside those of COMPARED, of the ratios that were searched at their own horizon."""

UNCHANGED = {rule: f"{rule}, nothing else changed" for rule in ("half", EMBEDDING)}
"""Rules at the base learning rate, warm-up, decay and beta2 that were tuned for uniform, by name."""

OTHERS = (*(rule for rule in COMPARED if rule != "uniform"), *UNCHANGED.values(), SEARCHED)
"""What is compared with uniform."""


def planned(shape: str, steps: int, rule: str) -> bool:
    """Return whether the study has runs of a rule at one horizon, or will have."""
    if rule == SEARCHED:
        return (shape, steps) in SEARCHES
    if rule == PREDICTED:
        return (shape, steps) == UNUSED
    if rule in (EMBEDDING, UNCHANGED[EMBEDDING]):
        return shape == "llama-600k"
    return steps != LONGEST or (shape == "llama-600k" and rule != "paper")


@dataclass(frozen=True)
class Tuned:
    """What was chosen for one rule at one horizon, and its val loss at every seed that has been trained."""

    arm: Arm
    losses: dict[int, float]  # by seed


def tuned(shape: str, steps: int, rule: str, results: Results) -> Tuned | None:
    """Return the choice for a rule, or None while its tuning has not ended."""
    if not planned(shape, steps, rule):
        return None
    best: Arm | None
    if rule == SEARCHED:
        best = search(shape, steps, results)[1]
    elif rule == PREDICTED:
        best = predicted(results)[1]
    elif rule in UNCHANGED.values():
        uniform = settled(shape, steps, "uniform", results)
        ratios = next(name for name, title in UNCHANGED.items() if title == rule)
        best = uniform and unchanged(uniform, ratios)
    else:
        best = settled(shape, steps, rule, results)
    if best is None or results.loss(best) is None:
        return None
    return Tuned(best, losses(best, results, SEEDS[steps]))


def all_tuned(results: Results) -> dict[tuple[str, int, str], Tuned]:
    """Return every rule whose tuning has ended, by shape, steps and rule."""
    found = {
        (shape, steps, rule): tuned(shape, steps, rule, results)
        for shape in MODELS
        for steps in HORIZONS
        for rule in ("uniform", *OTHERS, PREDICTED)
    }
    return {key: value for key, value in found.items() if value is not None}


def speedup(shape: str, steps: int, rule: str, found: dict[tuple[str, int, str], Tuned]) -> SpeedUpOverSeeds:
    """Return how many times as many steps a tuned uniform run needs, between fully decayed runs."""
    uniform = {n: found[shape, n, "uniform"] for n in HORIZONS if (shape, n, "uniform") in found}
    arm = found[shape, steps, rule]
    seeds = sorted(arm.losses.keys() & uniform[steps].losses.keys())
    return speedup_over_seeds(
        [
            # A horizon with fewer seeds stands in with its first.
            decayed_speedup(
                {n: each.losses.get(seed, each.losses[0]) for n, each in uniform.items()},
                arm.losses[seed],
                steps,
            )
            for seed in seeds
        ]
    )
