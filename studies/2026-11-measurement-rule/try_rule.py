"""Do the ratios of the rule win when a model is trained with them?

    python studies/2026-11-measurement-rule/try_rule.py --text TEXT.jsonl[.xz] --out runs/rule
    python studies/2026-11-measurement-rule/try_rule.py --list

Trains the LLaMA of 0.6M for 300 steps with the ratios of every rule that follows from data/measured (measure.py), each
tuned as the rules of the horizon study, at three seeds. Results go to data/runs. Runs that the horizon study has made
are read there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import text_runs
from arms import RULES, Arm
from baseline import ADAMW, tune_baseline
from joint_rule import joint_ratios
from measure import MEASURED, STEPS
from tuning import Results, at_seeds, tune_arm, waiting

from blockwise_lr import DirectionalReport

DATA = Path(__file__).parent / "data"
HORIZON = Path(__file__).parents[1] / "2026-11-horizon" / "data" / "runs"
SHAPE, SEEDS = "llama-600k", (0, 1, 2)
CENTRES = {
    "uniform": 8e-3,
    "the rule": 2.8e-3,
    "embedding alone": 5.6e-3,
    "measured": 2.8e-3,
    "the earlier rule": 2.8e-3,
    "after MoLS": 8e-3,
    "after LLR": 8e-3,
}
"""The base learning rates at which the search begins, by rule, in the order of the queue."""


@cache
def ratios_of(folder: Path = MEASURED) -> dict[str, Mapping[str, float]]:
    """Return the ratios of every rule, by its name; {} before measure.py has run."""
    if not (path := folder / f"{SHAPE}.json").exists():
        return {}
    measured = json.loads(path.read_text())
    reports = [DirectionalReport.from_dict(each) for each in measured["reports"]]
    rule, earlier = DirectionalReport.ratios_of_run(reports), joint_ratios(reports)[0]
    return {
        "uniform": RULES["uniform"],
        "measured": RULES["measured"],
        "the rule": {block.value: float(f"{ratio:.3g}") for block, ratio in rule.items()},
        "the earlier rule": {block.value: float(f"{ratio:.3g}") for block, ratio in earlier.items()},
        "embedding alone": {"emb": RULES["measured"]["emb"]},
        "after MoLS": measured["after MoLS"],
        "after LLR": measured["after LLR"],
    }


def tuning(rule: str, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the runs that tune a rule, as far as they are known, and what was chosen."""
    arms, best = tune_arm(Arm(SHAPE, STEPS, CENTRES[rule], ratios_of()[rule]), results)
    if best is None or rule != "uniform":
        return arms, best
    further, settled = tune_baseline(best, ADAMW, results)
    return [*arms, *further], settled


def _wanted(results: Results) -> Iterator[Arm]:
    chosen = []
    for rule in ratios_of():
        arms, best = tuning(rule, results)
        yield from arms
        chosen.append(best)
    for best in chosen:
        yield from at_seeds(best, SEEDS[1:])


def with_horizon(results: Results) -> Results:
    """Return the results together with those of the horizon study: an arm has one result, whoever trained it."""
    return Results({**text_runs.load(HORIZON).runs, **results.runs})


def queue(results: Results, shapes: Sequence[str] = ()) -> list[Arm]:
    """Return the arms that are still to be trained and follow from the results so far, in order."""
    known = with_horizon(results)
    return waiting(_wanted(known), known, shapes)


if __name__ == "__main__":
    text_runs.main(__doc__, queue, [SHAPE], results=DATA / "runs", out=Path("runs/rule"))
