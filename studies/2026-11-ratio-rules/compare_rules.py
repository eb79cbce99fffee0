"""Which rule for the ratios beats a tuned uniform learning rate, at which sizes, and by how much?

    python benchmarks/ratios.py run llama-2m --out runs/ratios
    python benchmarks/ratios.py edges --out runs/ratios
    python benchmarks/ratios.py report

`run SETTING`: `blockwise-lr compare` of the arms, each tuned over GRID times WARMUPS and then refined by a factor of
sqrt 2, three seeds at what the tune loss chose, the baseline for 2N steps too. With --own, also the ratios measured
along a uniform run of the setting's own, at a quarter of the learning rate that was chosen for the baseline; with
--powers those by powers of sharpness, as measured at the end of a uniform run; with --ratios-of those that --own
measured on another setting, such as a narrower model. Every arm has the same grid and number of runs. Runs are cached
in --out and kept in results/ratios/SETTING/runs.tar.gz, so an interrupted study goes on, from a fresh clone too, and
further arms can be added. Writes results/ratios/SETTING/compare.json and its figures. `edges`: what lies beyond
choices at the grid's edge, at seed 0; results/ratios/edges.json, of which no run is repeated. `report`:
results/ratios/README.md out of these and of longer.py, along.py and cousins.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from _runs import kept, run

from blockwise_lr.blocks import Block
from blockwise_lr.directional.ratios_from_report import ratios_from_sharpness
from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.ratios import MEASURED_RATIOS, spell_ratios
from blockwise_lr.sharpness import SharpnessReport
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.presets import get_preset
from blockwise_lr.train.ratio_text import parse_ratios

RESULTS = Path(__file__).parents[1] / "results" / "ratios"
GRID = (1e-3, 2e-3, 4e-3, 8e-3)
WARMUPS = (0.15, 0.6)
SEEDS = (0, 1, 2)
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


def settings() -> dict[str, TrainConfig]:
    """By name: "fitted" is where the ratios were searched, all others are held out."""
    # Precision and warm-up are those of the runs that are kept; without bf16 instructions a CPU takes hours for one.
    fixed = {"device": "cpu", "precision": "bf16", "report_to": "none", "save_every": 0}
    quickstart = replace(get_preset("quickstart"), **fixed)
    optim = replace(quickstart.optim, ratios="uniform", base_lr=4e-3, warmup_start="zero")
    quickstart = replace(quickstart, optim=optim)
    model = quickstart.model
    gpt2 = {"family": "gpt2", "tied": True}
    wide = {"hidden_size": 256, "heads": 4}
    return {
        "llama-600k": replace(quickstart, model=replace(model, hidden_size=64, heads=1)),
        "llama-2m": quickstart,
        "gpt2-1m": replace(quickstart, model=replace(model, **gpt2)),
        "llama-5m": replace(quickstart, model=replace(model, **wide)),
        "gpt2-4m": replace(quickstart, model=replace(model, **wide, **gpt2)),
        "llama-2m-code": replace(quickstart, data=replace(quickstart.data, data="CODE")),
        "llama-10m": replace(quickstart, model=replace(model, hidden_size=320, heads=5, layers=5)),
    }


def config_of(setting: str, out: Path) -> TrainConfig:
    """That setting, with its text in place (in `out` where it has to be made)."""
    config = settings()[setting]
    if config.data.data == "CODE":
        return replace(config, data=replace(config.data, data=str(python_source(out))))
    return config


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
        from ratios_report import write_report

        write_report(RESULTS)
    elif arguments.phase == "edges":
        try_edges(arguments.out / "edges")
    else:
        study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """One setting: its arms, compared, and what is kept of it."""
    config, out = config_of(arguments.setting, arguments.out), arguments.out / arguments.setting
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    write_json_atomic(path, config.to_dict())
    arms = arguments.arms or [*ARMS, *(() if config.model.tied else UNTIED_ARMS)]
    tuning = ("--base-lrs", *arguments.base_lrs, "--warmups", *arguments.warmups)
    results = RESULTS / arguments.setting
    with kept(results / "runs.tar.gz", out / "runs"):
        compare(path, out, arms, tuning)
        if further := further_arms(arguments, path, out):
            compare(path, out, [*arms, *further], tuning)
    for pattern in ("compare.json", "*.png", "report.md", "along/sharpness/directional.*"):
        for file in out.glob(pattern):
            shutil.copy(file, results)


def further_arms(arguments: argparse.Namespace, config: Path, out: Path) -> list[str]:
    """Those that need what the comparison chose for uniform: --own, --ratios-of, --powers."""
    further = []
    if arguments.own:
        further.append(arm("own", parse_ratios(str(along_uniform(config, out)))))
    for other in arguments.ratios_of:
        found = RESULTS / other / "directional.json"
        further.append(arm(f"own of {other}", parse_ratios(str(found))))
    if arguments.powers:
        report = SharpnessReport.from_json(at_the_end_of_uniform(config, out))
        further += [arm(name, ratios_from_sharpness(report, POWERS[name])) for name in arguments.powers]
    return further


def try_edges(out: Path) -> None:
    """EDGES that edges.json does not have yet: {"runs": [{"point", "tune_loss", "val_loss", "date"}]}."""
    out.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "edges.json"
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
    """directional.json along a uniform run at a quarter of the learning rate that was chosen for it."""
    return directional_along(config, out / "along", chosen_for_uniform(out)[0] / 4)


def directional_along(config: Path, run: Path, base_lr: float) -> Path:
    """directional.json of a uniform run, measured at 15 to 20 points on 4 batches each."""
    if not (found := run / "sharpness" / "directional.json").exists():
        train_with_checkpoints(config, run, base_lr)
        command("sharpness", run, "--directional", "--batches", 4)
        for checkpoint in run.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return found


def train_with_checkpoints(config: Path, run: Path, base_lr: float) -> None:
    """A uniform run that leaves 15 to 20 checkpoints along its way."""
    every = max(5, json.loads(config.read_text())["steps"] // 20)
    flags = ("--log-every", every, "--save-every", every, "--keep-checkpoints", 99, "--eval-every", 0)
    command("train", config, "--out", run, "--ratios", "uniform", "--base-lr", base_lr, *flags)


def at_the_end_of_uniform(config: Path, out: Path) -> Path:
    """sharpness.json of a uniform run at what was chosen for it."""
    run = out / "uniform"
    if not (found := run / "sharpness" / "sharpness.json").exists():
        lr, warmup = chosen_for_uniform(out)
        flags = ("--ratios", "uniform", "--base-lr", lr, "--warmup-fraction", warmup)
        command("train", config, "--out", run, *flags)
        command("sharpness", run)
    return found


def chosen_for_uniform(out: Path) -> tuple[float, float]:
    """Base learning rate and warm-up."""
    uniform = json.loads((out / "compare.json").read_text())["arms"]["uniform"]
    return uniform["base_lr"], uniform["warmup_fraction"]


def compare(config: Path, out: Path, arms: list[str], tuning: tuple[object, ...]) -> None:
    command("compare", config, "--arms", *arms, *tuning, "--refine", "--seeds", *SEEDS, "--out", out)


def command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "blockwise_lr", *map(str, arguments)], check=True)


def python_source(out: Path) -> Path:
    """The other text: Python's own standard library, one document a module."""
    path = out / "python.jsonl"
    if not path.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
        lines = [json.dumps({"text": p.read_text(encoding="utf-8", errors="replace")}) for p in files]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
    return path


if __name__ == "__main__":
    main()
