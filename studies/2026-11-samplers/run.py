"""Which sampler should `blockwise-lr tune` use, and when may it end a lost run?

    python studies/2026-11-samplers/run.py
    python studies/2026-11-samplers/run.py --repeats 2 --trials 12 --out runs/samplers   # a trial of the code

Nothing is trained: everything is computed from the runs that other studies recorded. Writes samplers.json and
early-end.json; report.py makes the pages from them. Needs `pip install -e ".[train,tune]"`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from race import BOXES, SAMPLERS, VARIANTS, races, start_points
from records import Run, all_runs, by_setting, run_to_run_noise
from replay import KINDS, NOISE, Set, behind, needed_margin, replay, sets_of, wrong_ends
from surrogate import NEAR, Surrogate, collect

from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.environment import describe_environment

HERE = Path(__file__).parent
SETTINGS = (
    "llama-600k, 300 steps",
    "llama-2m, 300 steps",
    "llama-5m, 300 steps",
    "llama-2m-code, 300 steps",
    "llama-2m, 1200 steps",
)
"""The settings that have a surrogate: AdamW, with runs of three sets of ratios or more."""
CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    "drawn": {"box": "recorded", "mean": False},
    "mean": {"box": "recorded", "mean": True},
    "wide box": {"box": "wide", "mean": False},
}
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
MARGINS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
ROWS = 3
"""Recorded train losses over which a gap is averaged, as in blockwise_lr.tune.early_end."""
BEHIND = 0.1
"""Nats that count as behind."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument(
        "--repeats", type=int, default=20, help="searches of each setting (default: %(default)s)"
    )
    parser.add_argument("--trials", type=int, default=40, help="runs of each search (default: %(default)s)")
    parser.add_argument(
        "--orders", type=int, default=200, help="random orders of a replay (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=150, help="L-BFGS steps of the surrogate's fit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="optuna")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = all_runs()
    about = {"command": " ".join(["run.py", *sys.argv[1:]]), **describe_environment("cpu")}
    early = early_ends(runs, arguments.orders)
    write_json_atomic(arguments.out / "early-end.json", {**about, **early})
    compared = compare(runs, arguments.repeats, arguments.trials, arguments.iterations)
    write_json_atomic(arguments.out / "samplers.json", {**about, **compared})


def compare(runs: Sequence[Run], repeats: int, trials: int, iterations: int) -> dict[str, Any]:
    """Fit the surrogate and run every sampler under every condition; the variants on drawn surfaces only."""
    settings = by_setting(runs)
    surrogate = Surrogate(collect(settings, SETTINGS), iterations)
    noise = run_to_run_noise(run for name in SETTINGS for run in settings[name])
    starts = {name: start_points(settings[name]) for name in SETTINGS}
    found: dict[str, Any] = {}
    for condition, where in CONDITIONS.items():
        samplers = {**SAMPLERS, **VARIANTS} if condition == "drawn" else SAMPLERS
        made = races(surrogate, starts, samplers, trials=trials, repeats=repeats, noise=noise, **where)
        found[condition] = {
            setting: {name: summary(curves) for name, curves in by_sampler.items()}
            for setting, by_sampler in made.items()
        }
        print(f"{condition}: done", flush=True)
    return {
        "repeats": repeats,
        "trials": trials,
        "noise": noise,
        "boxes": BOXES,
        "surrogate": describe(surrogate),
        "starts": {name: [point.to_dict() for point in points] for name, points in starts.items()},
        "nats_below_uniform": found,
    }


def summary(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Return the mean over repeats after each trial, and each repeat half way and at the end of the search."""
    array = np.array(curves)
    half = array.shape[1] // 2 - 1
    return {
        "mean": array.mean(0).round(4).tolist(),
        "half_way": array[:, half].tolist(),
        "end": array[:, -1].tolist(),
    }


def describe(surrogate: Surrogate) -> dict[str, Any]:
    """Return what the surrogate was fitted to and how well it predicts runs that it has not seen, by setting."""
    data = surrogate.data
    found: dict[str, Any] = {}
    for number, name in enumerate(data.settings):
        own = data.setting == number
        near = own & (data.above < NEAR)
        found[name] = {
            "points": int(own.sum()),
            "ratio_sets": len(data.group[own].unique()),
            "near": int(near.sum()),
            "spread": float(data.above[near].std()),
        }
        for key, by_group in (("one_run_left_out", False), ("one_ratio_set_left_out", True)):
            error, score = surrogate.left_out(by_group=by_group)
            found[name][key] = {
                "error": float(error[near].pow(2).mean().sqrt()),
                "error_over_expected": float(score[near].pow(2).mean().sqrt()),
            }
    return found


def early_ends(runs: Sequence[Run], orders: int) -> dict[str, Any]:
    """Replay all sets, fix the rule on the even ones, and test it on the odd ones."""
    sets = sets_of(runs, ROWS)
    halves = {"fixed": sets[::2], "tested": sets[1::2]}
    rules = {
        half: {f"{share:g}": grid(members, share, orders) for share in SHARES}
        for half, members in halves.items()
    }
    share, margin = choose(rules["fixed"])
    return {
        "rows": ROWS,
        "orders": orders,
        "noise": NOISE,
        "behind_by": BEHIND,
        "chosen": {"share": share, "margin": margin},
        "sets": [
            {
                "name": each.name,
                "half": "fixed" if each in halves["fixed"] else "tested",
                "runs": len(each.final),
                "needed": {f"{share:g}": needed_margin(each, share) for share in SHARES},
                "needed_near_best": {f"{share:g}": needed_margin(each, share, NOISE) for share in SHARES},
            }
            for each in sets
        ],
        "rules": rules,
        "behind": {
            kind: {f"{share:g}": behind(sets, kind, share, BEHIND) for share in (0.25, 0.5, 0.75)}
            for kind in KINDS
        },
        "overtaking": [late_pair(each, share=0.5) for each in sets],
    }


def grid(sets: Sequence[Set], share: float, orders: int) -> dict[str, Any]:
    """Return what the rules of one share do, by margin, as means over the sets."""
    found = {}
    for margin in MARGINS:
        outcomes = [replay(each, share, margin, orders) for each in sets]
        found[f"{margin:g}"] = {
            "saved": float(np.mean([outcome.saved for outcome in outcomes])),
            "lost": float(np.mean([outcome.lost for outcome in outcomes])),
            "regret": float(np.mean([outcome.regret for outcome in outcomes])),
            "wrong": float(np.mean([wrong_ends(each, share, margin) for each in sets])),
        }
    return found


def choose(rules: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[float, float]:
    """Return share and margin of the rule that saves most among those that end no better run in any pair."""
    safe = [
        (values["saved"], float(share), float(margin))
        for share, by_margin in rules.items()
        for margin, values in by_margin.items()
        if values["wrong"] == 0
    ]
    _, share, margin = max(safe)
    return share, margin


def late_pair(runs: Set, share: float) -> dict[str, Any]:
    """Return the pair in which the better run is farthest behind at or after a share of the run: its gap over time."""
    allowed = runs.logged >= share * runs.steps
    gap = runs.train[:, None] - runs.train[None]
    better = runs.final[:, None] < runs.final[None, :]
    largest = np.where(better, gap[:, :, allowed].max(axis=2), -np.inf)
    i, j = np.unravel_index(int(largest.argmax()), largest.shape)

    def spell(run: Run) -> dict[str, Any]:
        return {
            "ratios": run.ratios,
            "base_lr": run.base_lr,
            "warmup": run.warmup,
            "tune_loss": run.tune_loss,
        }

    return {
        "name": runs.name,
        "better": spell(runs.runs[i]),
        "worse": spell(runs.runs[j]),
        "share": (runs.logged / runs.steps).round(3).tolist(),
        "gap": gap[i, j].round(4).tolist(),
    }


if __name__ == "__main__":
    main()
