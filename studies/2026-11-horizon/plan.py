"""What to train next: a queue that follows from the results so far, the most telling runs first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from arms import RULES, Arm
from prediction import UNUSED, predicted
from rules import EMBEDDING, LONGEST, SEEDS, WIDER, baseline, carried, search, settled, tuning, unchanged
from tuning import Results, at_seeds, waiting

MAIN = ("uniform", "half", "measured")
SMALL, LARGE = "llama-600k", "llama-2m"


def variants(arm: Arm) -> Mapping[str, Mapping[str, Any]]:
    """Return what is tried on top of an arm's ratios: other decays, floors, and ratios that move along the run."""
    return {
        "decay constant": {"decay": "constant"},
        "decay of matrices": {"decay": "matrices"},
        "floor in proportion": {"floor": "proportional"},
        "ending half way": {"floor": {block: ratio**0.5 for block, ratio in arm.ratios.items()}},
        "shrinking to half way": {"shrink": 0.5},
    }


def _tuned(shape: str, steps: int, rules: Sequence[str], results: Results) -> Iterator[Arm]:
    """Yield the runs that tune rules at one horizon, and those of the other seeds."""
    for rule in rules:
        yield from tuning(shape, steps, rule, results)[0][:1]  # one of each says most
    for rule in rules:
        arms, best = tuning(shape, steps, rule, results)
        yield from arms
        if best is not None and rule == "uniform" and steps != LONGEST:
            yield from baseline(best, results)[0]
        yield from at_seeds(settled(shape, steps, rule, results), SEEDS[steps][1:])
        uniform = settled(shape, steps, "uniform", results)
        if uniform is not None and rule in ("half", EMBEDDING):
            yield from at_seeds(unchanged(uniform, rule), SEEDS[steps])


def _searched(shape: str, steps: int, results: Results) -> Iterator[Arm]:
    arms, best = search(shape, steps, results)
    yield from arms
    yield from at_seeds(best, SEEDS[steps][1:])


def _carried(results: Results) -> Iterator[Arm]:
    """Yield the runs at four times the width, once the search of as many steps has ended."""
    searched = search(SMALL, WIDER[1], results)[1]
    if searched is None:
        return
    arms = [*(settled(SMALL, WIDER[1], rule, results) for rule in MAIN), searched]
    every = [carried(arm, results) for arm in arms if arm is not None]
    for tried, _ in every:
        yield from tried
    for _, best in every:
        yield from at_seeds(best, SEEDS[WIDER[1]][1:])


def _varied(steps: int, results: Results) -> Iterator[Arm]:
    for rule in ("half", "measured"):
        if best := settled(SMALL, steps, rule, results):
            yield from (replace(best, **changes) for changes in variants(best).values())


def _wanted(results: Results) -> Iterator[Arm]:
    yield from _tuned(SMALL, 300, (*MAIN, "paper", EMBEDDING), results)
    yield from _tuned(SMALL, 1200, (*MAIN, "paper", EMBEDDING), results)
    yield from _tuned(SMALL, 4800, ("uniform", "half"), results)
    yield from _tuned(LARGE, 4800, ("uniform", "half"), results)
    yield from _tuned(SMALL, LONGEST, ("uniform", "half"), results)
    yield from _tuned(SMALL, 4800, (EMBEDDING, "measured"), results)
    yield from _tuned(SMALL, LONGEST, (EMBEDDING,), results)
    yield from _searched(SMALL, 300, results)
    yield from _carried(results)
    yield from _tuned(SMALL, LONGEST, ("measured",), results)
    yield from _varied(1200, results)
    yield from _tuned(*UNUSED, MAIN, results)
    arms, best = predicted(results)
    yield from arms
    yield from at_seeds(best, SEEDS[UNUSED[1]][1:])
    yield from _searched(SMALL, 1200, results)
    yield from _tuned(SMALL, 4800, ("paper",), results)
    yield from _varied(4800, results)
    yield from _searched(SMALL, 4800, results)
    for steps in (300, 1200, 4800):
        yield from _tuned(LARGE, steps, tuple(RULES), results)


def queue(results: Results, shapes: Sequence[str] = ()) -> list[Arm]:
    """Return the arms that are still to be trained and follow from the results so far, in order.

    Args:
        results: the runs that have ended.
        shapes: only arms of these shapes; empty: of all.
    """
    return waiting(_wanted(results), results, shapes)
