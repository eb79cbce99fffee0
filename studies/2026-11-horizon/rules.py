"""How every rule is tuned at every length of run, and what was chosen so far: all of it follows from the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from arms import RULES, Arm
from baseline import ADAMW, tune_baseline
from tuning import Results, bracket, search_from, three_digits, tune_arm

from blockwise_lr.tune.space import Space

EMBEDDING = "embedding alone"
COMPARED: Mapping[str, Mapping[str, float]] = {**RULES, EMBEDDING: {"emb": RULES["measured"]["emb"]}}
"""Ratios by name, with those where the embedding alone has `measured`'s ratio."""
SEEDS = {300: (0, 1, 2), 1200: (0, 1, 2), 4800: (0, 1, 2), 19200: (0,)}
# Where the search over base learning rates begins where neither a shorter horizon nor a smaller model has been tuned.
_CENTRES = {
    ("llama-2m", 4800): {"uniform": 4e-3, "half": 4e-3, "measured": 1.4e-3, "paper": 1e-3},
    ("llama-600k", 300): {
        "uniform": 8e-3,
        "half": 5.6e-3,
        "measured": 2.8e-3,
        "paper": 2.8e-3,
        EMBEDDING: 5.6e-3,
    },
}
_WARMUPS = {("llama-2m", 4800): 0.4}
"""The warm-up of such a start, where it is not the default: the one that the smaller model chose over 4 800 steps."""
# The rates at 4 800 steps lie far above those of 1 200. The last two rules to be tuned there begin at uniform's warm-up
# and at its rate times this, near where `half`'s tuning had ended, which began at what 1 200 steps chose.
_FROM_UNIFORM = {("llama-600k", 4800, EMBEDDING): 1.0, ("llama-600k", 4800, "measured"): 8**-0.5}
LONGEST = 19200
"""A horizon at which each rule has two base learning rates and nothing else is tuned: an hour a run."""
SPACE = Space(["emb", "qk", "vo", "norm", "head"])
TRIALS = {300: 40, 1200: 40, 4800: 20}
SEARCHES = (("llama-600k", 300), ("llama-600k", 1200), ("llama-600k", 4800))
WIDER = ("llama-6m", 300)
"""The model of four times the width of the searches', and the steps over which it trains with what they found."""


def begin(shape: str, steps: int, rule: str, results: Results) -> Arm | None:
    """Return the arm to begin with; None: not known.

    It is what a quarter of the steps chose, or for the 1.8M model what the smaller one chose for as many steps, at its
    rate over sqrt 2.
    """
    if rate := _CENTRES.get((shape, steps), {}).get(rule):
        first = Arm(shape, steps, rate, COMPARED[rule])
        return replace(first, warmup=_WARMUPS.get((shape, steps), first.warmup))
    if (shape, steps, rule) in _FROM_UNIFORM:
        uniform = tuning(shape, steps, "uniform", results)[1]
        return uniform and replace(
            uniform,
            ratios=COMPARED[rule],
            base_lr=three_digits(uniform.base_lr * _FROM_UNIFORM[shape, steps, rule]),
        )
    known = ("llama-600k", steps) if shape == "llama-2m" else (shape, steps // 4)
    best = tuning(*known, rule, results)[1]
    return best and replace(best, shape=shape, steps=steps, base_lr=three_digits(best.base_lr * 2**-0.5))


def tuning(shape: str, steps: int, rule: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune a rule at one horizon, as far as they are known, and what was chosen.

    At LONGEST these are two, with the settings that were chosen for a quarter of the steps.
    """
    if steps == LONGEST:
        shorter = settled(shape, steps // 4, rule, results)
        if shorter is None:
            return [], None
        rates = (shorter.base_lr, three_digits(shorter.base_lr * 2**-0.5))
        arms = [replace(shorter, steps=steps, base_lr=rate) for rate in rates]
        return arms, results.best(arms)
    first = begin(shape, steps, rule, results)
    return ([], None) if first is None else tune_arm(first, results)


def settled(shape: str, steps: int, rule: str, results: Results) -> Arm | None:
    """Return what was chosen for a rule, for uniform over weight decay and beta2 too; None: not known yet."""
    best = tuning(shape, steps, rule, results)[1]
    if best is None or rule != "uniform" or steps == LONGEST:
        return best
    return baseline(best, results)[1]


def baseline(chosen: Arm, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs of the uniform baseline over weight decay and beta2, `chosen` first, and the best of all."""
    arms, best = tune_baseline(chosen, ADAMW, results)
    return [chosen, *arms], best


def unchanged(uniform: Arm, rule: str) -> Arm:
    """Return the arm of a user who changes nothing but the ratios: those of a rule at all settings of tuned uniform."""
    return replace(uniform, ratios=COMPARED[rule])


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
