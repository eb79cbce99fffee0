"""What to train next: a queue that follows from the results so far, the most telling runs first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from arms import RULES, SHAPES, Arm
from baseline import Changes, tune_baseline
from tuning import Results, at_seeds, search_from, three_digits, tune_arm, waiting

from blockwise_lr import DirectionalReport
from blockwise_lr.tune.space import Space

MODELS = ("vit", "vit-timm")
SEEDS = (0, 1, 2)
SHORT, LONG = 780, 3120
"""The lengths of run, in steps: one pass over the images, and four."""

TRIALS = 40

# Where the search over base learning rates begins at the short length. The long one begins at half its choice.
_CENTRES: Mapping[str, float] = {
    "uniform": 2.8e-3,
    "half": 2.8e-3,
    "measured": 2e-3,
    "paper": 1e-3,
    "own": 2e-3,
}
BASELINE: Changes = {
    "decay 0.2": {"weight_decay": 0.2},
    "decay 0.01": {"weight_decay": 0.01},
    "beta2 0.99": {"beta2": 0.99},
    "clipping at 0.3": {"clip": 0.3},
}
"""Further settings that are tried for the uniform baseline."""

SEARCHED_FROM = ("uniform", "half", "measured")
"""The rules at whose tuned rates a search begins."""

SPACE = Space(("emb", "qk", "vo", "norm", "head", "pos", "conv"))
PATCHES: Mapping[str, Sequence[str]] = {"patches": ("conv",), "patches and positions": ("conv", "pos")}
"""The blocks that get the ratio of EMB, whose place they take in a vision Transformer. All rules give them 1."""


def rates(shape: str, steps: int, rule: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune a rule's base learning rate and warm-up, as far as they are known, and the choice.

    `own` needs the watched runs.
    """
    ratios = own_ratios(shape, results) if rule == "own" else RULES[rule]
    if ratios is None:
        return [], None
    first = Arm(shape, steps, _CENTRES[rule], ratios)
    if steps != SHORT:
        shorter = tuning(shape, SHORT, rule, results)[1]
        if shorter is None:
            return [], None
        first = replace(first, base_lr=three_digits(shorter.base_lr / 2), warmup=shorter.warmup)
    return tune_arm(first, results)


def tuning(shape: str, steps: int, rule: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune a rule at one length, as far as they are known, and what was chosen.

    `uniform`, the baseline, also gets other weight decays, another beta2 and another clipping. The rule `searched` is
    what the search found.
    """
    if rule == "searched":
        return search(shape, results) if steps == SHORT else ([], None)
    arms, best = rates(shape, steps, rule, results)
    if rule == "uniform" and best is not None:
        more, best = tune_baseline(best, BASELINE, results)
        arms = [*arms, *more]
    return arms, best


def watched(shape: str, results: Results) -> dict[str, Arm]:
    """Return the runs along which sharpness is measured, by name; empty until their rates are tuned.

    Reports along a run at a rate well below the best one say most about ratios, so `own` is read off that run.
    """
    found: dict[str, Arm] = {}
    for rule in ("uniform", "half"):
        best = tuning(shape, SHORT, rule, results)[1]
        if best is None:
            return {}
        found[rule] = replace(best, watched=True)
    slow = replace(found["uniform"], base_lr=three_digits(found["uniform"].base_lr / 4))
    return {"uniform": found["uniform"], "uniform, a quarter of the rate": slow, "half": found["half"]}


def own_ratios(shape: str, results: Results) -> dict[str, float] | None:
    """Return the ratios that follow from the model's own directional reports; None until they are made."""
    arms = watched(shape, results)
    run = results.runs.get(arms["uniform, a quarter of the rate"].name) if arms else None
    if run is None or run["tune_loss"] is None:
        return None
    reports = [DirectionalReport.from_dict(each["directional"]) for each in run["measurements"][1:]]
    return {block.value: three_digits(r) for block, r in DirectionalReport.ratios_of_run(reports).items()}


def search(shape: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the trials of the search for ratios, as far as they are known, and the best arm.

    The search begins at the tuned rates of SEARCHED_FROM. Its trials follow from the results alone.
    """
    chosen = [rates(shape, SHORT, rule, results)[1] for rule in SEARCHED_FROM]
    start = [arm for arm in chosen if arm is not None]
    if len(start) < len(chosen):
        return [], None
    return search_from(start, Arm(shape, SHORT, 1.0), SPACE, TRIALS, results)


def patches(shape: str, results: Results) -> dict[tuple[str, str], Arm]:
    """Return the runs in which PATCHES have the ratio of EMB, by rule and name, at the rule's own tuned rate."""
    found = {}
    for rule in ("half", "measured"):
        best = tuning(shape, SHORT, rule, results)[1]
        if best is None:
            continue
        for name, blocks in PATCHES.items():
            ratios = {**best.ratios, **dict.fromkeys(blocks, best.ratios["emb"])}
            found[rule, name] = replace(best, ratios=ratios)
    return found


def _wanted(shape: str, results: Results) -> Iterator[Arm]:
    rules = ("uniform", "half", "measured", "paper")
    for rule in rules:
        yield from tuning(shape, SHORT, rule, results)[0][:1]  # one of each says most
    for rule in rules:
        yield from tuning(shape, SHORT, rule, results)[0]
    for rule in rules:
        yield from at_seeds(tuning(shape, SHORT, rule, results)[1], SEEDS[1:])
    yield from watched(shape, results).values()
    if SHAPES[shape].library == "timm":
        return  # the second library repeats the comparison and the sharpness
    for rule in ("own", "searched"):
        arms, best = tuning(shape, SHORT, rule, results)
        yield from [*arms, *at_seeds(best, SEEDS[1:])]
    yield from patches(shape, results).values()
    for rule in rules:
        yield from tuning(shape, LONG, rule, results)[0]
    for rule in rules:
        yield from at_seeds(tuning(shape, LONG, rule, results)[1], SEEDS[1:])


def queue(results: Results, shapes: Sequence[str] = ()) -> list[Arm]:
    """Return the arms that are still to be trained and follow from the results so far, in order.

    Args:
        results: the runs that have ended.
        shapes: the models, names of SHAPES; empty: MODELS.
    """
    return waiting((arm for shape in shapes or MODELS for arm in _wanted(shape, results)), results)
