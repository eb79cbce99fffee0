"""Compare the rules for the ratios with a tuned uniform learning rate, at one setting after another.

    python studies/2026-11-ratio-rules/compare_rules.py run llama-2m --out runs/ratios
    python studies/2026-11-ratio-rules/compare_rules.py edges --out runs/ratios
    python studies/2026-11-ratio-rules/compare_rules.py report

`run SETTING` runs `blockwise-lr compare`. Each arm is tuned over GRID times WARMUPS by its tune loss, then refined by a
factor of sqrt 2. Three seeds are trained with the chosen values, and the baseline for 2N steps too. Every arm has the
same grid and the same number of runs. Three flags add arms:

    --own        ratios measured along a uniform run of this setting, at a quarter of the baseline's chosen rate
    --powers     ratios by powers of the sharpness at the end of a uniform run
    --ratios-of  ratios that --own measured on another setting, such as a narrower model

Runs are cached in --out and kept in data/SETTING/runs.tar.gz. An interrupted study therefore continues, also from a
fresh clone, and arms can be added later. The results are data/SETTING/compare.json and its figures.

`edges` trains what lies beyond choices at the grid's edge, at seed 0. It writes data/edges.json and repeats no run.
`report` writes README.md and details.md from all data of this folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwise_lr.blocks import Block
from blockwise_lr.directional.ratios_from_report import ratios_from_sharpness
from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.ratios import MEASURED_RATIOS, spell_ratios
from blockwise_lr.sharpness import SharpnessReport
from blockwise_lr.train.environment import describe_environment

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from joint_rule import joint_ratios_of
from kept_runs import kept, run
from model_settings import GRID, SEEDS, WARMUPS, config_of, settings

STUDY = Path(__file__).parent
DATA = STUDY / "data"
PAPER_HEAD = "emb=10,qk=8,vo=4,ffn=6,head=10"
EDGES = (
    ("llama-5m", "uniform", 2.83e-3, 0.8),
    ("llama-5m", "uniform", 4e-3, 0.8),
    ("gpt2-1m", "uniform", 8e-3, 0.8),
    ("llama-2m", PAPER_HEAD, 5e-4, 0.6),
    ("llama-5m", "paper", 5e-4, 0.6),
    ("llama-5m", "paper", 3.54e-4, 0.6),
    ("llama-5m", "paper", 2.5e-4, 0.6),
    ("gpt2-4m", "paper", 5e-4, 0.6),
    ("gpt2-4m", "paper", 3.54e-4, 0.6),
    ("gpt2-4m", "quickstart", 5e-4, 0.6),
    ("gpt2-4m", "measured", 5e-4, 0.6),
)
UNTIED_ARMS = (f"paper, head 10=adamw:{PAPER_HEAD}",)  # tied, the head is the embedding
POWERS = {"S^1/3": 1 / 3, "S^1/2": 1 / 2, "S^2/3": 2 / 3, "S^1": 1.0}
ARMS = (
    "uniform=adamw:uniform",
    "paper=adamw:paper",
    "searched=adamw:quickstart",
    f"measured=adamw:{spell_ratios(MEASURED_RATIOS)}",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    phases = parser.add_subparsers(dest="phase", required=True)
    runs = phases.add_parser("run")
    runs.add_argument("setting", choices=list(settings()))
    runs.add_argument("--out", type=Path, default=Path("runs/ratios"))
    runs.add_argument("--base-lrs", type=float, nargs="+", default=list(GRID))
    runs.add_argument("--warmups", type=float, nargs="+", default=list(WARMUPS))
    runs.add_argument("--arms", nargs="+", help="default: ARMS")
    runs.add_argument("--powers", nargs="*", default=[], choices=list(POWERS))
    runs.add_argument("--own", action="store_true")
    runs.add_argument("--ratios-of", nargs="*", default=[], metavar="SETTING", choices=list(settings()))
    beyond = phases.add_parser("edges")
    beyond.add_argument("--out", type=Path, default=Path("runs/ratios"))
    phases.add_parser("report")
    arguments = parser.parse_args()
    if arguments.phase == "report":
        from rules_report import write_report

        write_report(STUDY)
    elif arguments.phase == "edges":
        try_edges(arguments.out / "edges")
    else:
        study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """Compare the arms at one setting, and copy the results to data/SETTING."""
    config, out = config_of(arguments.setting, arguments.out), arguments.out / arguments.setting
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    write_json_atomic(path, config.to_dict())
    arms = arguments.arms or [*ARMS, *(() if config.model.tied else UNTIED_ARMS)]
    tuning = ("--base-lrs", *arguments.base_lrs, "--warmups", *arguments.warmups)
    results = DATA / arguments.setting
    with kept(results / "runs.tar.gz", out / "runs"):
        compare(path, out, arms, tuning)
        if further := further_arms(arguments, path, out):
            compare(path, out, [*arms, *further], tuning)
    for pattern in ("compare.json", "*.png", "report.md", "along/sharpness/directional.*"):
        for file in out.glob(pattern):
            shutil.copy(file, results)


def further_arms(arguments: argparse.Namespace, config: Path, out: Path) -> list[str]:
    """Return the arms that need what the comparison chose for uniform: --own, --ratios-of, --powers."""
    further = []
    if arguments.own:
        further.append(arm("own", joint_ratios_of(along_uniform(config, out))))
    for other in arguments.ratios_of:
        found = DATA / other / "directional.json"
        further.append(arm(f"own of {other}", joint_ratios_of(found)))
    if arguments.powers:
        report = SharpnessReport.from_json(at_the_end_of_uniform(config, out))
        further += [arm(name, ratios_from_sharpness(report, POWERS[name])) for name in arguments.powers]
    return further


def try_edges(out: Path) -> None:
    """Train those of EDGES that edges.json lacks: {"runs": [{"point", "tune_loss", "val_loss", "date"}]}."""
    out.mkdir(parents=True, exist_ok=True)
    path = DATA / "edges.json"
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    names = ("setting", "ratios", "base_lr", "warmup")
    done = {tuple(run["point"][name] for name in names) for run in known}
    about = {"command": " ".join(sys.argv), **describe_environment("cpu")}

    def one(*edge: Any) -> dict[str, Any]:
        setting, ratios, base_lr, warmup = edge
        config = config_of(setting, out)
        optim = replace(config.optim, ratios=ratios, base_lr=base_lr, warmup_fraction=warmup)
        found = run(out, replace(config, optim=optim), dict(zip(names, edge)))
        return {**found, "date": about["date"]}

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda edge: one(*edge), [edge for edge in EDGES if edge not in done]))
    write_json_atomic(path, {**about, "runs": known + runs})


def arm(name: str, ratios: Mapping[Block, float]) -> str:
    return f"{name}=adamw:{spell_ratios({b: float(f'{r:.3g}') for b, r in ratios.items()})}"


def along_uniform(config: Path, out: Path) -> Path:
    """Return directional.json along a uniform run at a quarter of the learning rate that was chosen for it."""
    return directional_along(config, out / "along", chosen_for_uniform(out)[0] / 4)


def directional_along(config: Path, run: Path, base_lr: float) -> Path:
    """Return directional.json of a uniform run, measured at 15 to 20 points on 4 batches each."""
    if not (found := run / "sharpness" / "directional.json").exists():
        train_with_checkpoints(config, run, base_lr)
        command("sharpness", run, "--directional", "--batches", 4)
        for checkpoint in run.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return found


def train_with_checkpoints(config: Path, run: Path, base_lr: float) -> None:
    """Train a uniform run that writes 15 to 20 checkpoints."""
    every = max(5, json.loads(config.read_text())["steps"] // 20)
    flags = ("--log-every", every, "--save-every", every, "--keep-checkpoints", 99, "--eval-every", 0)
    command("train", config, "--out", run, "--ratios", "uniform", "--base-lr", base_lr, *flags)


def at_the_end_of_uniform(config: Path, out: Path) -> Path:
    """Return sharpness.json at the end of a uniform run with its chosen base learning rate and warm-up."""
    run = out / "uniform"
    if not (found := run / "sharpness" / "sharpness.json").exists():
        lr, warmup = chosen_for_uniform(out)
        flags = ("--ratios", "uniform", "--base-lr", lr, "--warmup-fraction", warmup)
        command("train", config, "--out", run, *flags)
        command("sharpness", run)
    return found


def chosen_for_uniform(out: Path) -> tuple[float, float]:
    """Return the base learning rate and the warm-up that the comparison chose for uniform."""
    uniform = json.loads((out / "compare.json").read_text())["arms"]["uniform"]
    return uniform["base_lr"], uniform["warmup_fraction"]


def compare(config: Path, out: Path, arms: list[str], tuning: tuple[object, ...]) -> None:
    command("compare", config, "--arms", *arms, *tuning, "--refine", "--seeds", *SEEDS, "--out", out)


def command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "blockwise_lr", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
