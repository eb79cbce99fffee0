"""Check the rule that ends lost runs on the runs of the horizon study, which are longer and had no part in choosing it.

    python studies/2026-11-samplers/longer_runs.py

Those runs kept their val loss at 24 points and not their train loss, so val losses are compared. Writes
data/early-end-longer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import Run, in_order
from replay import needed_margin, sets_of, wrong_ends

from blockwise_lr.files import write_json_atomic
from blockwise_lr.tune.early_end import DEFAULT_RULE

HORIZON = Path(__file__).parents[1] / "2026-11-horizon" / "data" / "runs"
OUT = Path(__file__).parent / "data" / "early-end-longer.json"


def horizon_runs(folder: Path = HORIZON) -> list[Run]:
    """Return the runs at seed 0 that did not diverge; `train` holds their val loss along the run."""
    found = []
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        arm, curve = run["arm"], tuple((step, loss) for step, loss in run["curve"])
        if arm["seed"] == 0 and run["tune_loss"] is not None and all(loss is not None for _, loss in curve):
            name = f"{arm['shape']}, {arm['steps']} steps"
            ratios = in_order(arm["ratios"])
            losses = run["tune_loss"], run["val_loss"]
            found.append(Run(name, ratios, arm["base_lr"], arm["warmup"], 0, *losses, curve, curve))
    return found


def check(runs: list[Run]) -> list[dict[str, Any]]:
    """Return for each setting with LEAST runs or more how the rule does on all pairs of a better and a worse run."""
    share, margin = DEFAULT_RULE.share, DEFAULT_RULE.margin
    return [
        {
            "setting": each.name,
            "runs": len(each.runs),
            "farthest_behind": needed_margin(each, share),
            "wrong": wrong_ends(each, share, margin),
        }
        for each in sorted(sets_of(runs, rows=1), key=lambda each: each.steps)
    ]


def rows(content: Mapping[str, Any]) -> list[list[str]]:
    """Return a row a setting for the page."""
    return [
        [each["setting"], str(each["runs"]), f"{each['farthest_behind']:.3f}", f"{each['wrong']:.1%}"]
        for each in content["sets"]
    ]


if __name__ == "__main__":
    write_json_atomic(OUT, {"sets": check(horizon_runs())})
