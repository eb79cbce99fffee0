"""Which rule for the ratios beats a tuned uniform learning rate, at which sizes, and by how much?

    python benchmarks/ratios.py run llama-2m --out runs/ratios
    python benchmarks/ratios.py report

`run SETTING`: `blockwise-lr compare` of the arms over GRID, three seeds at what the tune loss chose, the baseline for
2N steps too; then again with the ratios by powers of sharpness, as measured at the end of a uniform run. Every arm has
the same grid and number of runs. Runs are cached in --out, so an interrupted study goes on. Writes
results/ratios/SETTING/compare.json and its figures. `report`: results/ratios/README.md out of all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.measured import ratios_from_sharpness
from blockwise_lr.optim.ratios import spell_ratios
from blockwise_lr.pretrain.config import TrainConfig
from blockwise_lr.pretrain.presets import get_preset
from blockwise_lr.sharpness import SharpnessReport

RESULTS = Path(__file__).parents[1] / "results" / "ratios"
CACHED = RESULTS.parent / "quickstart" / "runs"
FITTED = "llama-2m"
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
POWERS = {"S^1/3": 1 / 3, "S^1/2": 1 / 2, "S^2/3": 2 / 3, "S^1": 1.0}
ARMS = (
    "uniform=adamw:uniform",
    "paper=adamw:paper",
    "paper, head 10=adamw:emb=10,qk=8,vo=4,ffn=6,head=10",
    "searched=adamw:quickstart",
    "auto=adamw:auto",
)


def settings() -> dict[str, TrainConfig]:
    """By name: "fitted" is where the ratios were searched, all others are held out."""
    quickstart = replace(get_preset("quickstart"), device="cpu", report_to="none", save_every=0)
    model = quickstart.model
    gpt2 = {"family": "gpt2", "tied": True}
    wide = {"hidden_size": 256, "heads": 4}
    return {
        "llama-2m": quickstart,
        # The baseline goes on gaining with longer warm-ups (results/quickstart/edges.json): its best one, for all arms.
        "llama-2m-warmup60": replace(quickstart, optim=replace(quickstart.optim, warmup_fraction=0.6)),
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
    runs.add_argument("--arms", nargs="+", default=list(ARMS))
    runs.add_argument("--powers", nargs="*", default=list(POWERS), choices=list(POWERS))
    phases.add_parser("report")
    arguments = parser.parse_args()
    if arguments.phase == "report":
        from ratios_report import write_report

        write_report(RESULTS)
    else:
        study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """One setting: its arms, compared, and what is kept of it."""
    config, out = config_of(arguments.setting, arguments.out), arguments.out / arguments.setting
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    write_json_atomic(path, config.to_dict())
    if CACHED.is_dir() and arguments.setting == FITTED:
        (out / "runs").mkdir(exist_ok=True)
        for run in CACHED.iterdir():  # the quickstart's own grid: the same runs
            shutil.copytree(run, out / "runs" / run.name, dirs_exist_ok=True)
    compare(path, out, arguments.arms, arguments.base_lrs)
    if arguments.powers:
        report = SharpnessReport.from_json(measured(path, out))
        powers = []
        for name in arguments.powers:
            ratios = {b: float(f"{r:.3g}") for b, r in ratios_from_sharpness(report, POWERS[name]).items()}
            powers.append(f"{name}=adamw:{spell_ratios(ratios)}")
        compare(path, out, [*arguments.arms, *powers], arguments.base_lrs)
    kept = RESULTS / arguments.setting
    kept.mkdir(parents=True, exist_ok=True)
    for pattern in ("compare.json", "*.png", "report.md"):
        for file in out.glob(pattern):
            shutil.copy(file, kept)


def measured(config: Path, out: Path) -> Path:
    """sharpness.json of a uniform run at the learning rate that was chosen for it."""
    found = out / "uniform" / "sharpness" / "sharpness.json"
    if not found.exists():
        arms = json.loads((out / "compare.json").read_text())["arms"]
        command(
            "train",
            config,
            "--out",
            out / "uniform",
            "--ratios",
            "uniform",
            "--base-lr",
            arms["uniform"]["base_lr"],
        )
        command("sharpness", out / "uniform")
    return found


def compare(config: Path, out: Path, arms: list[str], base_lrs: list[float]) -> None:
    command("compare", config, "--arms", *arms, "--base-lrs", *base_lrs, "--seeds", *SEEDS, "--out", out)


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
