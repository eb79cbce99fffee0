"""Add rules to a setting of compare_rules.py whose runs were not kept.

    python studies/2026-11-ratio-rules/add_rules.py llama-5m paper=paper searched=quickstart --out runs/further
    python studies/2026-11-ratio-rules/add_rules.py llama-5m --own --out runs/further
    python studies/2026-11-ratio-rules/add_rules.py llama-5m --ratios-of llama-600k --out runs/further
    python studies/2026-11-ratio-rules/add_rules.py llama-5m --curves --out runs/further

Each arm NAME=RATIOS is tuned over the base learning rates and warm-ups of data/SETTING/compare.json, refined by sqrt 2,
and trained with the same seeds, as `blockwise-lr compare` would. --own adds the ratios measured along a uniform run of
the setting, at a quarter of the baseline's chosen rate. --ratios-of SETTING adds those measured so on another setting.

The loss gap and the speed-up between fully decayed runs are against the uniform runs of compare.json. The paper's
speed-up needs the loss curves of the uniform runs of 2N steps. --curves trains these again, and stops if one does not
end at the committed loss to 1e-6. The chosen run of `measured` at the first seed is always trained again first; the
file records how far from the committed loss this machine ends.

The results are added to data/SETTING/added-rules.json. Runs are cached in --out and kept in added-rules-runs.tar.gz, so
that a study continues from a fresh clone.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blockwise_lr.compare.over_seeds import loss_gap, speedup_over_seeds
from blockwise_lr.compare.results import read_run
from blockwise_lr.compare.speedup import UNDEFINED, decayed_speedup, paper_speedup
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from compare_rules import DATA, arm, directional_along
from joint_rule import joint_ratios_of
from kept_runs import kept, name_of, run, tune_loss
from model_settings import config_of, settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=list(settings()))
    parser.add_argument("arms", nargs="*", metavar="NAME=RATIOS")
    parser.add_argument("--own", action="store_true")
    parser.add_argument("--ratios-of", nargs="*", default=[], metavar="SETTING", choices=list(settings()))
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/further"))
    arguments = parser.parse_args()
    out = arguments.out / arguments.setting
    out.mkdir(parents=True, exist_ok=True)
    study = json.loads((DATA / arguments.setting / "compare.json").read_text())
    arms = [each.split("=", 1) for each in arguments.arms]
    if arguments.own:
        arms.append(["own", own(arguments.setting, study, out)])
    for other in arguments.ratios_of:
        arms.append([f"own of {other}", spelled(DATA / other / "directional.json")])
    path = DATA / arguments.setting / "added-rules.json"
    found = json.loads(path.read_text()) if path.exists() else {"arms": {}, "comparisons": []}
    with kept(path.with_name("added-rules-runs.tar.gz"), out):
        found["again"] = again(arguments.setting, study, out)
        if arguments.curves:
            found["curves"] = baseline_curves(arguments.setting, study, out)
        for name, ratios in arms:
            found["arms"][name] = {
                "command": " ".join(sys.argv),
                **train(arguments.setting, study, ratios, out),
            }
        found["comparisons"] = [
            {"arm": name, "against": "uniform", **compare(study, trained, found.get("curves"))}
            for name, trained in found["arms"].items()
        ]
        found |= {"command": " ".join(sys.argv), **describe_environment("cpu")}
        write_json_atomic(path, found)


def own(setting: str, study: dict[str, Any], out: Path) -> str:
    """Measure along a uniform run of the setting, keep the measurement in data/SETTING, and return its ratios."""
    config = out / "config.json"
    write_json_atomic(config, config_of(setting, out).to_dict())
    found = directional_along(config, out / "along", study["arms"]["uniform"]["base_lr"] / 4)
    for file in found.parent.glob("directional.*"):
        shutil.copy(file, DATA / setting)
    return spelled(found)


def spelled(directional: Path) -> str:
    """Return the mean ratios of a directional.json, spelled as --ratios takes them."""
    return arm("", joint_ratios_of(directional)).partition(":")[2]


def one(
    setting: str, ratios: str, base_lr: float, warmup: float, seed: int, out: Path, steps: int | None = None
) -> dict[str, Any]:
    config = configured(setting, ratios, base_lr, warmup, seed, out, steps)
    point = {"ratios": ratios, "base_lr": base_lr, "warmup": warmup, "seed": seed}
    return run(out, config, point)


def configured(
    setting: str, ratios: str, base_lr: float, warmup: float, seed: int, out: Path, steps: int | None = None
) -> TrainConfig:
    config = config_of(setting, out)
    optim = replace(config.optim, ratios=ratios, base_lr=base_lr, warmup_fraction=warmup)
    return replace(config, seed=seed, optim=optim, steps=steps or config.steps)


def baseline_curves(setting: str, study: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """Return the validation losses along the uniform runs of 2N steps: {"seed", "steps", "val_losses"} a seed."""
    arm = study["arms"]["uniform 2N"]
    how = (arm["ratios"], arm["base_lr"], arm["warmup_fraction"])

    def curve(seed: dict[str, Any]) -> dict[str, Any]:
        again = one(setting, *how, seed["seed"], out, arm["steps"])
        if abs(again["val_loss"] - seed["terminal_val_loss"]) > 1e-6:
            raise SystemExit(
                f"uniform 2N, seed {seed['seed']} ends at {again['val_loss']}, and the committed run at "
                f"{seed['terminal_val_loss']}: its curve would be another run's"
            )
        name = name_of(configured(setting, *how, seed["seed"], out, arm["steps"]))
        steps, losses = read_run(out / name).curve()
        return {"seed": seed["seed"], "steps": steps, "val_losses": losses}

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(curve, arm["seeds"]))


def again(setting: str, study: dict[str, Any], out: Path) -> dict[str, float]:
    """Train `measured` again at the first seed, and return its validation loss as committed and as found here."""
    before = study["arms"]["measured"]
    seed = before["seeds"][0]
    here = one(setting, before["ratios"], before["base_lr"], before["warmup_fraction"], seed["seed"], out)
    return {"committed": seed["terminal_val_loss"], "here": here["val_loss"]}


def train(setting: str, study: dict[str, Any], ratios: str, out: Path) -> dict[str, Any]:
    """Tune and train one arm, and return it in the form of compare.json, with its tuning."""
    first, *others = study["seeds"]
    with ThreadPoolExecutor(2) as pool:

        def try_all(lrs: list[float], warmups: list[float]) -> list[dict[str, Any]]:
            points = [(lr, warmup) for warmup in warmups for lr in lrs]
            return list(pool.map(lambda p: one(setting, ratios, *p, first, out), points))

        tuning = try_all(study["base_lrs"], study["warmups"])
        best = min(tuning, key=tune_loss)["point"]
        near = [float(f"{best['base_lr'] * factor:.3g}") for factor in (2**-0.5, 2**0.5)]
        tuning += try_all(near, [best["warmup"]])
        chosen = min(tuning, key=tune_loss)
        best = chosen["point"]
        final = [
            chosen,
            *pool.map(lambda s: one(setting, ratios, best["base_lr"], best["warmup"], s, out), others),
        ]
    return {
        "optimizer": "adamw",
        "ratios": ratios,
        "base_lr": best["base_lr"],
        "warmup_fraction": best["warmup"],
        "steps": study["steps"],
        "seeds": [{"seed": r["point"]["seed"], "terminal_val_loss": r["val_loss"]} for r in final],
        "tuning": tuning,
    }


def compare(
    study: dict[str, Any], trained: dict[str, Any], curves: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """Compare the arm with the baseline of compare.json, seed by seed."""
    horizons = {arm["steps"]: losses(arm) for arm in study["arms"].values() if arm["role"] == "baseline"}
    ours, n_steps = losses(trained), study["steps"]
    decayed = [
        decayed_speedup({steps: of[i] for steps, of in horizons.items()}, target, n_steps=n_steps)
        for i, target in enumerate(ours)
    ]
    along = [
        paper_speedup(curve["steps"], curve["val_losses"], target, n_steps)
        for curve, target in zip(curves or [], ours)
    ]
    return {
        "loss_gap": asdict(loss_gap(horizons[n_steps], ours)),
        "speedup": asdict(speedup_over_seeds(along or [UNDEFINED])),
        "speedup_decayed": asdict(speedup_over_seeds(decayed)),
    }


def losses(arm: dict[str, Any]) -> list[float]:
    """Return the terminal validation loss of each seed; infinite for a diverged run."""
    found = [seed["terminal_val_loss"] for seed in arm["seeds"]]
    return [math.inf if loss is None else loss for loss in found]


if __name__ == "__main__":
    main()
