"""Search all ratios together, and as hard the settings of one learning rate for all blocks.

    python studies/2026-11-ratio-rules/search_ratios.py llama-2m --out runs/search

Two searches of --trials runs each go side by side, one core each, by Bayesian optimisation (optuna's Gaussian process),
by the tune loss at seed 0. One is over all ratios, the base learning rate and the warm-up. The other is over a uniform
learning rate, the warm-up, weight decay, beta2 and clipping. The ratios keep the decay, beta2 and clipping of the
preset, which an earlier search had found for the uniform baseline.

Writes data/search/SETTING.json. Runs are cached in --out, and the searches are deterministic: a second call repeats
nothing. Needs `pip install -e ".[train,tune]"`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.ratios import spell_ratios
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from compare_rules import DATA
from kept_runs import run, tune_loss
from model_settings import config_of, settings

DIVERGED = 10.0  # nats: above the loss of an untrained model, so that the search turns away
SHARED = {"base_lr": (5e-4, 1.6e-2), "warmup_fraction": (0.05, 0.8)}
UNIFORM = {**SHARED, "weight_decay": (0.01, 0.3), "one_minus_beta2": (5e-3, 0.1), "clip": (0.1, 3.0)}
# FFN is 1: the base learning rate says how fast it goes.
RATIOS = {**SHARED, "emb": (1, 64), "head": (1, 64), "norm": (1, 64), "vo": (0.02, 1), "qk": (0.25, 4)}
LINEAR = {"warmup_fraction"}
UNIFORM_KNOWN = (
    {"base_lr": 4e-3, "warmup_fraction": 0.6, "weight_decay": 0.03, "one_minus_beta2": 0.05, "clip": 0.3},
)
RATIOS_KNOWN = (
    {"base_lr": 4e-3, "warmup_fraction": 0.15, "emb": 8, "head": 8, "norm": 8, "vo": 0.1, "qk": 1},
    {"base_lr": 1.2e-3, "warmup_fraction": 0.15, "emb": 16, "head": 16, "norm": 32, "vo": 0.5, "qk": 4},
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=list(settings()))
    parser.add_argument("--trials", type=int, default=40, help="runs of each search (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = arguments.out / arguments.setting
    out.mkdir(parents=True, exist_ok=True)
    base = replace(config_of(arguments.setting, arguments.out), eval_every=0)
    blocks = dict(RATIOS)
    if base.model.tied:  # the head is the embedding
        del blocks["head"]

    def searched(space: dict[str, tuple[float, float]], known: Any, configure: Any) -> dict[str, Any]:
        return search(out, space, known, lambda point: configure(base, point), arguments.trials)

    with ThreadPoolExecutor(2) as pool:
        uniform = pool.submit(searched, UNIFORM, UNIFORM_KNOWN, with_settings)
        ratios = pool.submit(searched, blocks, RATIOS_KNOWN, with_ratios)
        found = {"uniform": uniform.result(), "ratios": ratios.result()}
    about = {"command": " ".join(sys.argv), **describe_environment("cpu"), "config": base.to_dict()}
    (DATA / "search").mkdir(parents=True, exist_ok=True)
    write_json_atomic(DATA / "search" / f"{arguments.setting}.json", {**about, **found})
    for name, result in found.items():
        print(name, result["best"])


def search(
    out: Path,
    space: dict[str, tuple[float, float]],
    known: tuple[dict[str, float], ...],
    configure: Callable[[dict[str, float]], TrainConfig],
    trials: int,
) -> dict[str, Any]:
    """Search the space with `trials` runs, beginning with the known points; return all runs and the best."""
    runs: list[dict[str, Any]] = []

    def objective(trial: optuna.Trial) -> float:
        point = {
            name: float(f"{trial.suggest_float(name, low, high, log=name not in LINEAR):.3g}")
            for name, (low, high) in space.items()
        }
        runs.append(run(out, configure(point), point))
        return min(tune_loss(runs[-1]), DIVERGED)

    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=0))
    for point in known:
        study.enqueue_trial({name: value for name, value in point.items() if name in space})
    study.optimize(objective, n_trials=trials)
    return {"space": space, "best": min(runs, key=tune_loss), "runs": runs}


def with_settings(base: TrainConfig, point: dict[str, float]) -> TrainConfig:
    """Return the configuration with one learning rate for all blocks and the settings of a point."""
    optim = {name: value for name, value in point.items() if name != "one_minus_beta2"}
    return replace(
        base, optim=replace(base.optim, ratios="uniform", beta2=1 - point["one_minus_beta2"], **optim)
    )


def with_ratios(base: TrainConfig, point: dict[str, float]) -> TrainConfig:
    """Return the configuration with the ratios, base learning rate and warm-up of a point."""
    ratios = {name: value for name, value in point.items() if name not in SHARED}
    optim = {name: point[name] for name in SHARED}
    return replace(base, optim=replace(base.optim, ratios=spell_ratios(ratios), **optim))


if __name__ == "__main__":
    main()
