"""Compare uniform and blockwise learning rates in each optimizer, and decay and clipping with them.

    python studies/2026-11-optimizers/compare_optimizers.py run adam-mini --out runs/optimizers  # lion, muon, wsd too
    python studies/2026-11-optimizers/compare_optimizers.py settings --out runs/optimizers
    python studies/2026-11-optimizers/compare_optimizers.py report

The model and text are the quickstart's. `run` runs `blockwise-lr compare` of uniform, paper and measured in one
optimizer, and of auto where the optimizer's updates can be read. `wsd` compares uniform and measured in AdamW under the
paper's schedule of that name. Every arm is tuned over the same four base learning rates (Lion and Muon: five), then a
factor of sqrt 2 to either side of its best. Three seeds are trained with what the tune loss chose, and the baseline for
2N steps too. The warm-up is 60 %, which AdamW's uniform baseline wants; the measured ratios lose 0.03 nats by it there.
`wsd` tries 15 % and 33 %, the longest it allows, at the middle two rates. AdamW under the cosine schedule is taken from
../2026-11-ratio-rules/data/llama-2m, which was tuned over two warm-ups.

`settings` trains the measured ratios in AdamW with each of VARIANTS of weight decay and clipping, tuned over
SETTINGS_LRS, with three seeds.

Runs are cached in --out and kept in runs.tar.gz beside the results, so that a study continues from a fresh clone.
Writes data/NAME/compare.json, data/settings.json, and data/state.json (bytes of state of each optimizer on this model).
`report` writes README.md and details.md from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blockwise_lr import build_optimizer
from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.ratios import MEASURED_RATIOS, spell_ratios
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment

sys.path += [str(Path(__file__).parents[1] / "_support"), str(Path(__file__).parents[2] / "benchmarks")]

from kept_runs import kept, run, tune_loss
from model_settings import SEEDS, settings

from optimizers import state_bytes

STUDY = Path(__file__).parent
DATA = STUDY / "data"
GRID = (1e-3, 2e-3, 4e-3, 8e-3)
WARMUP = 0.6
MEASURED = spell_ratios(MEASURED_RATIOS)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam-mini": {},
    "lion": {"weight_decay": 0.3},  # a tenth of the learning rate, so ten times the decay
    "muon": {},
    "wsd": {"optimizer": "adamw", "schedule": "wsd", "warmup_fraction": 0.15},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "decay coupled, clipped as a whole": {},
    "decay constant": {"decay": "constant"},
    "decay of matrices only": {"weight_decay_by_block": "emb=0,head=0,norm=0"},
    "each block clipped at 0.12": {"clip_by_block": "0.12"},  # 0.3 over the root of six blocks
}
SETTINGS_LRS = (1e-3, 2e-3)  # between which `measured` is flat


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    phases = parser.add_subparsers(dest="phase", required=True)
    runs = phases.add_parser("run")
    runs.add_argument("name", choices=list(OPTIMIZERS))
    runs.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    tried = phases.add_parser("settings")
    tried.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    phases.add_parser("report")
    arguments = parser.parse_args()
    if arguments.phase == "run":
        compare(arguments.name, arguments.out / arguments.name)
    elif arguments.phase == "settings":
        try_settings(arguments.out / "settings")
    else:
        from optimizers_report import write_report

        write_report(STUDY)


def config_of(**optim: Any) -> TrainConfig:
    """Return the quickstart's configuration with other optimizer settings."""
    config = settings()["llama-2m"]
    given = {"warmup_fraction": WARMUP, **optim}
    return replace(config, optim=replace(config.optim, **given))


def compare(name: str, out: Path) -> None:
    """Compare the arms in one optimizer, and copy the results to data/NAME."""
    optim = {"optimizer": name, **OPTIMIZERS[name]}
    optimizer = optim["optimizer"]
    rules = {"uniform": "uniform", "paper": "paper", "measured": MEASURED, "auto": "auto"}
    if name == "wsd":
        rules = {rule: rules[rule] for rule in ("uniform", "measured")}
    elif name != "adam-mini":
        del rules["auto"]
    scale = 0.1 if name == "lion" else 1.0
    warmups, grid = (WARMUP,), GRID
    if name == "wsd":
        warmups, grid = (0.15, 0.33), GRID[1:3]
    elif name in ("lion", "muon"):
        grid = (*GRID, 1.6e-2)  # uniform was best at the edge
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "config.json", config_of(**optim).to_dict())
    command = [
        sys.executable, "-m", "blockwise_lr", "compare", out / "config.json",
        "--arms", *(f"{rule}={optimizer}:{ratios}" for rule, ratios in rules.items()),
        "--base-lrs", *(f"{scale * lr:g}" for lr in grid), "--warmups", *warmups, "--refine",
        "--seeds", *SEEDS, "--out", out,
    ]  # fmt: skip
    results = DATA / name
    with kept(results / "runs.tar.gz", out / "runs"):
        subprocess.run([str(part) for part in command], check=True)
    for pattern in ("compare.json", "report.md", "*.png"):
        for file in out.glob(pattern):
            shutil.copy(file, results)
    states = DATA / "state.json"
    known = json.loads(states.read_text()) if states.exists() else {}
    write_json_atomic(states, known | {each: bytes_of_state(each) for each in ("adamw", optimizer)})


def bytes_of_state(optimizer: str) -> int:
    """Return the bytes of optimizer state of the quickstart's model after one step."""
    model = build_model(config_of().model, seed=0)
    made = build_optimizer(optimizer, model, 1e-3)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    made.step()
    return state_bytes(made)


def try_settings(out: Path) -> None:
    """Tune each variant at the first seed, then train the other seeds at its best.

    Writes {"runs": [{"point", "diverged", "tune_loss", "val_loss"}]}; the first of a variant are those at its choice.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = {"ratios": "measured", "warmup_fraction": 0.15}  # the warm-up that these ratios are best at

    def one(variant: str, base_lr: float, seed: int) -> dict[str, Any]:
        config = replace(config_of(**{**base, "base_lr": base_lr, **VARIANTS[variant]}), seed=seed)
        return run(out, config, {"variant": variant, "base_lr": base_lr, "seed": seed})

    runs: list[dict[str, Any]] = []
    with kept(DATA / "settings" / "runs.tar.gz", out), ThreadPoolExecutor(2) as pool:
        for variant in VARIANTS:
            grid = [(variant, lr, SEEDS[0]) for lr in SETTINGS_LRS]
            tuning = sorted(pool.map(lambda of: one(*of), grid), key=tune_loss)
            best = tuning[0]["point"]["base_lr"]
            others = [(variant, best, seed) for seed in SEEDS[1:]]
            runs += [tuning[0], *pool.map(lambda of: one(*of), others), *tuning[1:]]
    about = {"command": f"python {' '.join(sys.argv)}", **describe_environment("cpu")}
    write_json_atomic(DATA / "settings.json", {**about, "runs": runs})


if __name__ == "__main__":
    main()
