"""What to train next: a queue that follows from the results so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from along_the_run import measured
from arms import RULES, Arm
from baseline import ADAMW, tune_baseline
from tuning import Results, at_seeds, search_from, three_digits, tune_arm, waiting

from blockwise_lr.tune.space import Space

STEPS = 300
SEEDS = (0, 1, 2)
DENSE = "llama-600k"
SHAPES = ("qwen3-next", "mamba-2", "mixtral", DENSE)
"""The models on which every rule is tuned. The dense LLaMA's runs are those of the horizon study, where it has them."""

_FIRST = {
    "uniform": (0.0113, 0.6),
    "half": (0.00396, 0.4),
    "measured": (0.0014, 0.15),
    "paper": (0.0028, 0.6),
    "own": (0.0014, 0.15),
}
"""The base learning rate and warm-up to begin with: what the horizon study chose for the dense LLaMA; own begins where
measured does."""

IN_PARTS = {"mamba-2": "mamba-2-parts"}
"""The shape under which a model is measured and searched, and trains with ratios of parts."""

TRIALS = 24
SPACES = {
    "qwen3-next": Space(["emb", "qk", "vo", "norm", "head", "ssm", "conv"]),
    "mamba-2-parts": Space(["emb", "qk", "vo", "norm", "head", "conv"], reference="ssm"),
    "mixtral": Space(["emb", "qk", "vo", "norm", "head", "router"]),
}
"""What is searched, with the blocks that other models do not have."""

EXPERTS = (0.25, 0.5, 2.0, 4.0)
"""Factors on the learning rate of all feed-forward matrices, on top of `half`: experts or dense."""

ROUTERS = (0.25, 4.0)
"""Factors on the router's learning rate, on top of `half`."""

ENDS = {"low to high": (0.5, 4.0), "high to low": (2.0, 0.25), "ends high": (1.0, 4.0)}
"""The feed-forward matrices' ratio, and the ratio of the floor at which they end, on top of `half`."""

SEARCHED_FROM = ("uniform", "half", "measured")
"""The rules at whose tuned rates a search begins."""

TUNED = (*RULES, "own")
"""The rules that are tuned on every model."""


def rates(shape: str, rule: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune a rule's base learning rate and warm-up, as far as they are known, and the choice."""
    base_lr, warmup = _FIRST[rule]
    ratios = own_ratios(shape) if rule == "own" else RULES[rule]
    if ratios is None:
        return [], None
    trained = IN_PARTS.get(shape, shape) if rule == "own" else shape
    return tune_arm(Arm(trained, STEPS, base_lr, ratios, warmup), results)


def tuning(shape: str, rule: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune a rule on one model, as far as they are known, and what was chosen.

    `uniform`, the baseline, also gets other weight decays and another beta2.
    """
    arms, best = rates(shape, rule, results)
    if rule == "uniform" and best is not None:
        more, best = tune_baseline(best, ADAMW, results)
        arms = [*arms, *more]
    return arms, best


def measured_along(shape: str, results: Results) -> Arm | None:
    """Return the uniform run along which a model is measured; None while uniform is not tuned.

    Reports along a run at a quarter of the tuned rate say most about ratios.
    """
    best = tuning(shape, "uniform", results)[1]
    if best is None:
        return None
    return replace(best, shape=IN_PARTS.get(shape, shape), base_lr=three_digits(best.base_lr / 4))


def own_ratios(shape: str) -> dict[str, float] | None:
    """Return the ratios that follow from the model's own measurement; None until measure.py has made it."""
    found = measured().get(IN_PARTS.get(shape, shape))
    if found is None:
        return None
    return {block.value: three_digits(ratio) for block, ratio in found.own.items()}


def searched_model(shape: str) -> str:
    """Return the model that a search trains under the name of `shape`."""
    return next((model for model, parts in IN_PARTS.items() if parts == shape), shape)


def search(shape: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the trials of the search for a model's ratios, as far as they are known, and the best arm.

    Mamba-2 in parts is the same model as Mamba-2: the search begins at the rules that were tuned on that.
    """
    start = [rates(searched_model(shape), rule, results)[1] for rule in SEARCHED_FROM]
    known = [arm for arm in start if arm is not None]
    if len(known) < len(start):
        return [], None
    # The same run under the name of the shape that is searched; measured has QK and VO there, so it is another run.
    begin = [replace(arm, shape=shape) for arm in known]
    missing = [arm for arm in begin if results.loss(arm) is None]
    if missing:
        return missing, None
    return search_from(begin, Arm(shape, STEPS, 1.0), SPACES[shape], TRIALS, results)


def expert_arms(shape: str, results: Results) -> dict[str, Arm]:
    """Return the arms that move the feed-forward matrices, or the router, from where `half` has them, by name."""
    best = tuning(shape, "half", results)[1]
    if best is None:
        return {}
    arms = {"half": best}
    for factor in EXPERTS:
        arms[f"FFN x{factor:g}"] = replace(best, ratios={**best.ratios, "ffn": factor})
    for name, (ratio, end) in ENDS.items():
        arms[f"FFN {name}"] = replace(best, ratios={**best.ratios, "ffn": ratio}, floor={"ffn": end})
    if shape != DENSE:
        for factor in ROUTERS:
            arms[f"ROUTER x{factor:g}"] = replace(best, ratios={**best.ratios, "router": factor})
    return arms


def _wanted(results: Results) -> Iterator[Arm]:
    chosen: dict[tuple[str, str], Arm] = {}
    for shape in SHAPES:
        for rule in TUNED:
            arms, best = tuning(shape, rule, results)
            yield from arms
            if best is not None:
                chosen[shape, rule] = best
        for rule in TUNED:
            yield from at_seeds(chosen.get((shape, rule)), SEEDS[1:])
    for shape in ("mixtral", DENSE):
        for seed in SEEDS:
            yield from (replace(arm, seed=seed) for arm in expert_arms(shape, results).values())
    for shape in SPACES:
        arms, best = search(shape, results)
        yield from arms
        yield from at_seeds(best, SEEDS[1:])


def queue(results: Results, shapes: Sequence[str] = ()) -> list[Arm]:
    """Return the arms that are still to be trained and follow from the results so far, in order.

    Args:
        results: the runs that have ended.
        shapes: only arms of these models; empty: of all.
    """
    return waiting(_wanted(results), results, shapes)
