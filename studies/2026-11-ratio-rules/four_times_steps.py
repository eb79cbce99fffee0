"""Compare the rules over four times the steps: does the gain last, and do ratios measured there keep more of it?

    python studies/2026-11-ratio-rules/four_times_steps.py --out runs/longer

The model is the quickstart's, over LONGER times its steps. `own` is measured along a uniform run of that length, at a
quarter of the base learning rate that was chosen for uniform. Each rule of LRS is tuned at seed 0 by its tune loss:
first its base learning rates at the warm-up that won over the quickstart's steps, then the other warm-up at the best of
them, then a factor of sqrt 2 to either side. All seeds are trained with the chosen values. No rule has more runs than
uniform.

Writes data/four-times-steps.json after each rule, and keeps the runs in data/four-times-steps/runs.tar.gz; a second
call continues. `compare_rules.py report` shows the results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwise_lr.directional.directional_report import reports_of
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.environment import describe_environment

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from add_rules import spelled
from compare_rules import DATA, directional_along
from kept_runs import kept, run, tune_loss
from model_settings import GRID, SEEDS, WARMUPS, settings

LONGER = 4
LRS = {"uniform": (*GRID, 2.83e-3), "own": (5e-4, 1e-3, 2e-3, 4e-3), "measured": (5e-4, *GRID)}
FIRST_WARMUP = {"uniform": 0.6, "measured": 0.15, "own": 0.15}  # as chosen over N steps
CONFIG = replace(settings()["llama-2m"], steps=LONGER * settings()["llama-2m"].steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/longer"))
    arguments = parser.parse_args()
    out, path = arguments.out, DATA / "four-times-steps.json"
    out.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text())

    about = {"command": " ".join(sys.argv), "steps": CONFIG.steps, **describe_environment("cpu")}
    with kept(path.parent / "four-times-steps" / "runs.tar.gz", out), ThreadPoolExecutor(2) as pool:
        for rule in LRS:
            ratios = own(out, chosen(found["runs"], "uniform")["base_lr"] / 4) if rule == "own" else rule
            runs = {each: [run for run in found["runs"] if run["point"]["rule"] == each] for each in LRS}
            runs[rule] = tuned(rule, ratios, out, pool)
            found |= {**about, "runs": [run for each in LRS for run in runs[each]]}
            write_json_atomic(path, found)


def chosen(runs: list[dict[str, Any]], rule: str) -> dict[str, Any]:
    """Return the point that a rule was trained with at every seed."""
    point: dict[str, Any] = next(run["point"] for run in runs if run["point"]["rule"] == rule)
    return point


def tuned(rule: str, ratios: str, out: Path, pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """Tune a rule and return all its runs, the chosen one of each seed first."""

    def all_of(points: list[tuple[float, float, int]]) -> list[dict[str, Any]]:
        return list(pool.map(lambda point: one(rule, ratios, *point, out), points))

    first = FIRST_WARMUP[rule]
    (other,) = set(WARMUPS) - {first}
    tuning = all_of([(lr, first, SEEDS[0]) for lr in LRS[rule]])
    best = min(tuning, key=tune_loss)["point"]
    tuning += all_of([(best["base_lr"], other, SEEDS[0])])
    best = min(tuning, key=tune_loss)["point"]
    near = [float(f"{best['base_lr'] * factor:.3g}") for factor in (2**-0.5, 2**0.5)]
    tuning += all_of([(lr, best["warmup"], SEEDS[0]) for lr in near])
    tuning.sort(key=tune_loss)
    best = tuning[0]["point"]
    return [tuning[0], *all_of([(best["base_lr"], best["warmup"], seed) for seed in SEEDS[1:]]), *tuning[1:]]


def one(rule: str, ratios: str, base_lr: float, warmup: float, seed: int, out: Path) -> dict[str, Any]:
    optim = replace(CONFIG.optim, ratios=ratios, base_lr=base_lr, warmup_fraction=warmup)
    point = {"rule": rule, "ratios": ratios, "base_lr": base_lr, "warmup": warmup, "seed": seed}
    return run(out, replace(CONFIG, optim=optim, seed=seed), point)


def own(out: Path, base_lr: float) -> str:
    """Return the ratios measured along a uniform run of this length, kept in data/four-times-steps."""
    path = DATA / "four-times-steps" / "directional.json"
    if not path.exists() or abs(measured_at(path) / base_lr - 1) > 0.02:
        config = out / "config.json"
        write_json_atomic(config, CONFIG.to_dict())
        shutil.copy(directional_along(config, out / f"along-{base_lr:g}", base_lr), path)
    return spelled(path)


def measured_at(directional: Path) -> float:
    """Return the highest learning rate along a run: its base learning rate, to within a step of the schedule."""
    reports = reports_of(json.loads(directional.read_text()))
    return max(slope.lr for report in reports for slope in report.values())


if __name__ == "__main__":
    main()
