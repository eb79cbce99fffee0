"""The rules whose tuning has ended: their losses, what they win over uniform, and how much faster they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from arms import RULES, Arm
from comparison_tables import speedup_cell
from plan import LONG, MODELS, SEEDS, SHORT, tuning
from tuning import Results

from blockwise_lr.compare.over_seeds import speedup_over_seeds
from blockwise_lr.compare.speedup import decayed_speedup

TUNED = (*RULES, "own", "searched")


@dataclass(frozen=True)
class Tuned:
    """What was chosen for one rule at one length, and its results at every seed that has been trained."""

    arm: Arm
    runs: dict[int, Mapping[str, Any]]  # by seed

    @property
    def losses(self) -> dict[int, float]:
        """The val loss by seed; infinite for a run that diverged."""
        found = {seed: run["val_loss"] for seed, run in self.runs.items()}
        return {seed: math.inf if loss is None else float(loss) for seed, loss in found.items()}

    def mean(self, key: str) -> float:
        """Return the mean of a value over the seeds; NaN if a run diverged."""
        values = [run[key] for run in self.runs.values()]
        return math.nan if None in values else sum(values) / len(values)


Found = Mapping[tuple[str, int, str], Tuned]
"""What was chosen, by shape, steps and rule."""


def all_tuned(results: Results) -> Found:
    """Return every rule whose tuning has ended."""
    found = {}
    for shape in MODELS:
        for steps in (SHORT, LONG):
            for rule in TUNED:
                _, best = tuning(shape, steps, rule, results)
                if best is not None:
                    names = {seed: replace(best, seed=seed).name for seed in SEEDS}
                    runs = {s: results.runs[name] for s, name in names.items() if name in results.runs}
                    found[shape, steps, rule] = Tuned(best, runs)
    return found


def speedup(found: Found, shape: str, steps: int, rule: str) -> str:
    """How many times as many steps a tuned uniform run needs, between fully decayed runs."""
    uniform = {n: found[shape, n, "uniform"] for n in (SHORT, LONG) if (shape, n, "uniform") in found}
    arm = found[shape, steps, rule]
    seeds = sorted(arm.losses.keys() & uniform[steps].losses.keys())
    each = [
        decayed_speedup({n: u.losses.get(s, u.losses[0]) for n, u in uniform.items()}, arm.losses[s], steps)
        for s in seeds
    ]
    over = speedup_over_seeds(each)
    return speedup_cell(over.value, over.bound)
