"""Further settings of a baseline that has its rates: a fair baseline is tuned in all that its users tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tuning import Arm, Results

Changes = Mapping[str, Mapping[str, float]]
"""Fields of an arm that are changed together, by the name that tables give the change."""

ADAMW: Changes = {
    "decay 0.1": {"weight_decay": 0.1},
    "decay 0.01": {"weight_decay": 0.01},
    "beta2 0.99": {"beta2": 0.99},
    "beta2 0.9": {"beta2": 0.9},
}
"""What the horizon study tries for the uniform baseline, whose decay is 0.03 and whose beta2 is 0.95."""


def tune_baseline(chosen: Arm, changes: Changes, results: Results) -> tuple[list[Arm], Arm | None]:
    """Return the further runs of a baseline, one a change, and the best of them and `chosen` once all have ended."""
    arms = [replace(chosen, **fields) for fields in changes.values()]
    return arms, results.best([chosen, *arms])


def gains_of_changes(chosen: Arm, changes: Changes, results: Results) -> list[str]:
    """Return the nats of tune loss that each change wins over `chosen`, as cells; "-" for a run that is missing."""
    first = results.loss(chosen)
    losses = [results.loss(arm) for arm in tune_baseline(chosen, changes, results)[0]]
    return ["-" if loss is None or first is None else f"{first - loss:+.3f}" for loss in losses]
