"""Choose the constants of the rule on the small models' reports, and test the choice on the model that is left out.

    python studies/2026-11-measurement-rule/choose_rule.py

Prints, for each choice, how far the reports alone are from the ratios that won, and each leave-one-model-out test.
rule_report.py shows the same in the page.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blockwise_lr import DirectionalReport
from blockwise_lr.blocks import Block
from blockwise_lr.directional.directional_report import reports_of
from blockwise_lr.directional.run_ratios import DAMPING, RunRatios, ratios_along
from blockwise_lr.optim.ratios import MEASURED_RATIOS

STUDIES = Path(__file__).parents[1]
MODELS: Mapping[str, tuple[str, ...]] = {
    "llama-600k": ("llama-600k",),
    "gpt2-1m": ("gpt2-1m",),
    "llama-2m": ("llama-2m", "near-best-rate", "four-times-steps"),
}
"""The small models, and the folders of their reports in the study of the ratio rules."""

LARGE = "llama-134m"
BLOCKS = (Block.EMB, Block.QK, Block.VO, Block.NORM, Block.HEAD)
"""The blocks whose ratios are compared; FFN is 1, and POS has no ratio that is known to win."""


class Choice(NamedTuple):
    """The constants that are chosen: the damping, and the bounds of the change at one report."""

    damping: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"damping {self.damping:g}, {self.low:g} to {self.high:g}"


CHOICES = [
    Choice(damping, *bounds)
    for damping in (0.0, 0.3, 1.0, 3.0, 10.0)
    for bounds in ((0.1, 20.0), (0.03, 30.0), (0.05, 50.0), (0.1, 100.0))
]
CHOSEN = Choice(DAMPING, 0.1, 20.0)


@cache
def reports() -> dict[str, list[DirectionalReport]]:
    """Return the reports of each set, those of the small models first."""
    rules = STUDIES / "2026-11-ratio-rules" / "data"
    found = {
        name: reports_of(json.loads((rules / name / "directional.json").read_text()))
        for names in MODELS.values()
        for name in names
    }
    large = json.loads((STUDIES / "2026-11-paper-scale" / "data" / "240-steps.json").read_text())
    return {**found, LARGE: [DirectionalReport.from_dict(each) for each in large["directional"]]}


@cache
def ratios(name: str, choice: Choice = CHOSEN) -> RunRatios:
    """Return the ratios of a set of reports."""
    return ratios_along(reports()[name], choice.low, choice.high, damping=choice.damping)


def distance(names: Sequence[str], choice: Choice) -> float:
    """Return how far the reports alone are from `measured`: root mean square over blocks and sets, in powers of 2."""
    logs = [
        math.log2(ratios(name, choice).alone[block] / MEASURED_RATIOS[block])
        for name in names
        for block in BLOCKS
        if block in ratios(name, choice)
    ]
    return math.sqrt(sum(log**2 for log in logs) / len(logs))


def leave_one_out(model: str) -> tuple[Choice, float]:
    """Return the choice that is best for the other models' sets, and its distance on the sets of `model`."""
    others = [name for other, names in MODELS.items() if other != model for name in names]
    best = min(CHOICES, key=lambda choice: distance(others, choice))
    return best, distance(MODELS[model], best)


def search_spread(within: float = 0.03) -> dict[str, float]:
    """Return how far the ratios of nearly best runs are from `measured`, by block, in powers of 2.

    The runs are those of the search over all ratios of the LLaMA of 1.8M that end within so many nats of its best.
    """
    path = STUDIES / "2026-11-ratio-rules" / "data" / "search" / "llama-2m.json"
    runs = [run for run in json.loads(path.read_text())["ratios"]["runs"] if run["tune_loss"] is not None]
    best = min(run["tune_loss"] for run in runs)
    near = [run["point"] for run in runs if run["tune_loss"] <= best + within]
    return {
        block.value: math.sqrt(
            float(np.mean([math.log2(point[block.value] / MEASURED_RATIOS[block]) ** 2 for point in near]))
        )
        for block in BLOCKS
    }


def report_scatter(name: str) -> dict[Block, float]:
    """Return the factor by which one report of a set scatters about the mean, by block; at least 3 by the rule."""
    found = ratios(name)
    return {
        block: math.exp(found.log_error[block] * math.sqrt(found.reports))
        for block in BLOCKS
        if block in found
    }


def main() -> None:
    small = [name for names in MODELS.values() for name in names]
    for choice in sorted(CHOICES, key=lambda choice: distance(small, choice)):
        print(
            choice, *(f"{distance([name], choice):.2f}" for name in small), f"{distance(small, choice):.2f}"
        )
    for model in MODELS:
        print(f"without {model}:", *leave_one_out(model))
    for name in reports():
        print(name, ratios(name).paste(), *ratios(name).notes(), sep="\n    ")
    print("nearly best runs of the search:", search_spread())


if __name__ == "__main__":
    sys.exit(main())
