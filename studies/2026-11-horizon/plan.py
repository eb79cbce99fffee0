"""What to train next: a queue that follows from the results so far, the most telling runs first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from arms import RULES, Arm
from tuning import Results, bracket, search_from, three_digits, tune_arm

from blockwise_lr.tune.space import Space

SEEDS = {300: (0, 1, 2), 1200: (0, 1, 2), 4800: (0, 1), 19200: (0,)}
# Where the search over base learning rates begins where no shorter horizon has been tuned.
_CENTRES = {
    ("llama-2m", 4800): {"uniform": 2.8e-3, "half": 2.8e-3, "measured": 1e-3, "paper": 7e-4},
    ("llama-2m", 300): {"uniform": 8e-3, "half": 4e-3, "measured": 2e-3, "paper": 2e-3},
    ("llama-600k", 300): {"uniform": 8e-3, "half": 5.6e-3, "measured": 2.8e-3, "paper": 2.8e-3},
}
_ORDER: Sequence[tuple[str, int, tuple[str, ...]]] = (
    ("llama-600k", 300, ("uniform", "half", "measured", "paper")),
    ("llama-600k", 1200, ("uniform", "half", "measured", "paper")),
    ("llama-600k", 4800, ("uniform", "half", "measured")),
    ("llama-2m", 4800, ("measured", "uniform", "half")),
    ("llama-2m", 300, ("uniform", "half", "measured", "paper")),
    ("llama-2m", 1200, ("uniform", "half", "measured", "paper")),
    ("llama-600k", 4800, ("paper",)),
    ("llama-2m", 4800, ("paper",)),
)
_LONGEST = ("llama-600k", 19200, ("uniform", "half", "measured"))
SPACE = Space(["emb", "qk", "vo", "norm", "head"])
TRIALS = {300: 40, 1200: 40, 4800: 20}
SEARCHES = (("llama-600k", 300), ("llama-600k", 1200), ("llama-600k", 4800))
WIDER = ("llama-6m", 300)
"""The model of four times the width of the searches', and the steps over which it trains with what they found."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "decay constant": {"decay": "constant"},
    "decay of matrices": {"decay": "matrices"},
    "floor in proportion": {"floor": "proportional"},
    "shrinking to half way": {"shrink": 0.5},
}
_BASELINE: Sequence[Mapping[str, float]] = (
    {"weight_decay": 0.1},
    {"weight_decay": 0.01},
    {"beta2": 0.99},
    {"beta2": 0.9},
)


def begin(shape: str, steps: int, rule: str, results: Results) -> Arm | None:
    """Return the arm to begin with: what a quarter of the steps chose, at its rate over sqrt 2; None: not known."""
    if rate := _CENTRES.get((shape, steps), {}).get(rule):
        return Arm(shape, steps, rate, RULES[rule])
    best = tuning(shape, steps // 4, rule, results)[1]
    return best and replace(best, steps=steps, base_lr=three_digits(best.base_lr * 2**-0.5))


def tuning(shape: str, steps: int, rule: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune a rule at one horizon, as far as they are known, and what was chosen."""
    first = begin(shape, steps, rule, results)
    return ([], None) if first is None else tune_arm(first, results)


def baseline(chosen: Arm, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the further runs of the uniform baseline over weight decay and beta2, and the best of all."""
    arms = [chosen, *(replace(chosen, **changes) for changes in _BASELINE)]
    return arms, results.best(arms)


def unchanged(uniform: Arm) -> Arm:
    """Return the arm of a user who changes nothing but the ratios: the default at all settings of tuned uniform."""
    return replace(uniform, ratios=RULES["half"])


def search(shape: str, steps: int, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the trials of the search for ratios at one horizon, as far as they are known, and the best arm.

    The search begins at the tuned arms of uniform, half and measured at this horizon, and at the arm that the search of
    a quarter of the steps found, with its base learning rate over sqrt 2. Its trials follow from the results alone.
    """
    chosen = [tuning(shape, steps, rule, results)[1] for rule in ("uniform", "half", "measured")]
    start = [arm for arm in chosen if arm is not None]
    if len(start) < len(chosen):
        return [], None
    arms: list[Arm] = []
    if steps // 4 in TRIALS:
        shorter = search(shape, steps // 4, results)[1]
        if shorter is None:
            return [], None
        arms.append(replace(shorter, steps=steps, base_lr=three_digits(shorter.base_lr * 2**-0.5)))
    return search_from(start, Arm(shape, steps, 1.0), SPACE, TRIALS[steps], results, first=arms)


def carried(found: Arm, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune the base learning rate of an arm at four times the width, and what was chosen.

    Ratios, warm-up and decay stay as they were found on the narrow model. The rates begin at half of its rate.
    """
    shape, steps = WIDER
    return bracket(
        replace(found, shape=shape, steps=steps, base_lr=three_digits(found.base_lr / 2), seed=0), results
    )


def _carried(chosen: Mapping[tuple[str, int, str], Arm], searched: Arm, results: Results) -> Iterator[Arm]:
    steps = WIDER[1]
    arms = [*(chosen["llama-600k", steps, rule] for rule in ("uniform", "half", "measured")), searched]
    every = [carried(arm, results) for arm in arms]
    for tried, _ in every:
        yield from tried
    for _, best in every:
        if best is not None:
            yield from (replace(best, seed=seed) for seed in SEEDS[steps][1:])


def _wanted(results: Results) -> Iterator[Arm]:
    chosen: dict[tuple[str, int, str], Arm] = {}
    for shape, steps, rules in _ORDER:
        for rule in rules:
            yield from tuning(shape, steps, rule, results)[0][:1]  # one of each says most
        for rule in rules:
            arms, best = tuning(shape, steps, rule, results)
            yield from arms
            if best is not None and rule == "uniform":
                more, best = baseline(best, results)
                yield from more
            if best is not None:
                chosen[shape, steps, rule] = best
        for rule in rules:
            if best := chosen.get((shape, steps, rule)):
                yield from (replace(best, seed=seed) for seed in SEEDS[steps][1:])
        if best := chosen.get((shape, steps, "uniform")):
            yield from (replace(unchanged(best), seed=seed) for seed in SEEDS[steps])
    for shape, steps in SEARCHES:
        arms, best = search(shape, steps, results)
        yield from arms
        if best is not None:
            yield from (replace(best, seed=seed) for seed in SEEDS[steps][1:])
            if steps == WIDER[1]:
                yield from _carried(chosen, best, results)
    for steps in (1200, 4800):
        for rule in ("half", "measured"):
            if best := chosen.get(("llama-600k", steps, rule)):
                yield from (replace(best, **changes) for changes in VARIANTS.values())
    shape, steps, rules = _LONGEST
    for rule in rules:
        if best := chosen.get((shape, 4800, rule)):
            rates = (best.base_lr, best.base_lr * 2**-0.5)
            yield from (replace(best, steps=steps, base_lr=three_digits(rate)) for rate in rates)


def queue(results: Results, shapes: Sequence[str] = ()) -> list[Arm]:
    """Return the arms that are still to be trained and follow from the results so far, in order.

    Args:
        results: the runs that have ended.
        shapes: only arms of these shapes; empty: of all.
    """
    arms = {arm.name: arm for arm in _wanted(results) if not shapes or arm.shape in shapes}
    return [arm for name, arm in arms.items() if name not in results.runs]
