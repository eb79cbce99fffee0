"""Find the quickstart's ratios, settings and learning rates.

    python studies/2026-11-quickstart-ratios/tune_quickstart.py search --out runs/tune-quickstart
    python studies/2026-11-quickstart-ratios/tune_quickstart.py grid --out runs/tune-quickstart
    python studies/2026-11-quickstart-ratios/tune_quickstart.py edges --out runs/tune-quickstart

`search` makes two coordinate searches of 9 runs each (N steps, seed 0, by the loss on the tune split). One is over the
ratios of the blocks and starts from those that won a trial on other text. The other is over the decay, beta2, warm-up
and clipping of the uniform baseline, so that neither side is searched harder. Writes data/search.json. Its result is
entered by hand as QUICKSTART_RATIOS and in the preset; a test checks both.

`grid` runs `blockwise-lr compare`: every arm over one grid of base learning rates at a warm-up of 15 %, then three
seeds at the chosen ones. It is the earlier of the two comparisons; the ratio-rules study tunes the warm-up too. Writes
compare.json and the reports in data/.

`edges` goes one step further where the search stopped at the edge of what it tried, at the learning rate of the preset.
Writes data/edges.json. Runs are cached in --out.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.presets import get_preset

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from kept_runs import run, tune_loss

DATA = Path(__file__).parent / "data"
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
ARMS = ("adamw:uniform", "adamw:paper", "adamw:quickstart")
BASE_LR = 2e-3
RATIO_START = {"emb": 4.0, "vo": 0.1, "norm": 8.0, "head": 4.0, "qk": 1.0, "ffn": 1.0}
# The slow block first: it hides what the others can take.
RATIO_MOVES = {"vo": (0.05, 0.2), "norm": (4, 16), "emb": (2, 8), "head": (2, 8)}
BASELINE_START = {"weight_decay": 0.1, "beta2": 0.95, "warmup_fraction": 0.05, "clip": 1.0}
BASELINE_MOVES = {
    "weight_decay": (0.03, 0.3),
    "beta2": (0.9, 0.99),
    "warmup_fraction": (0.02, 0.15),
    "clip": (0.3, 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phase", choices=["search", "grid", "edges"])
    parser.add_argument("--out", type=Path, default=Path("runs/tune-quickstart"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    phases = {"search": search_settings, "grid": tune_base_lrs, "edges": try_edges}
    phases[arguments.phase](arguments.out)


def search_settings(out: Path) -> None:
    """Run both searches side by side, one core each."""
    with ThreadPoolExecutor(2) as pool:
        ratios = pool.submit(search, out, RATIO_START, RATIO_MOVES, with_ratios)
        baseline = pool.submit(search, out, BASELINE_START, BASELINE_MOVES, with_settings)
        found = {"ratios": ratios.result(), "baseline": baseline.result()}
    about = {"command": " ".join(sys.argv), **describe_environment("cpu"), "config": base_config().to_dict()}
    DATA.mkdir(parents=True, exist_ok=True)
    write_json_atomic(DATA / "search.json", {**about, **found})
    for name, result in found.items():
        print(name, result["best"])


def tune_base_lrs(out: Path) -> None:
    """Compare the arms over GRID, and copy the results without the checkpoints."""
    compared = out / "compare"
    grid = [
        "--base-lrs",
        *map(str, GRID),
        "--warmup-fraction",
        "0.15",
        "--seeds",
        "0",
        "1",
        "2",
        "--jobs",
        "2",
        "--out",
        str(compared),
    ]
    command = [sys.executable, "-m", "blockwise_lr", "compare", "quickstart", "--arms", *ARMS, *grid]
    subprocess.run(command, check=True)
    for file in compared.glob("*.*"):
        shutil.copy(file, DATA)
    for folder in (compared / "runs").glob("*/"):
        (DATA / "runs" / folder.name).mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "metrics.jsonl", "result.json"):
            shutil.copy(folder / name, DATA / "runs" / folder.name)


def try_edges(out: Path) -> None:
    """Train beyond the edges, one setting at a time; warm-up further, since it went on helping the baseline."""
    preset = replace(get_preset("quickstart"), device="cpu", precision="bf16", report_to="none")
    optim = {"ratios": "uniform", "base_lr": 4e-3, "warmup_fraction": 0.15, "warmup_start": "zero"}
    preset = replace(preset, optim=replace(preset.optim, **optim))
    arms: dict[str, list[dict[str, Any]]] = {
        "uniform": [
            {}, *({"warmup_fraction": share} for share in (0.25, 0.4, 0.6, 0.8)),
            {"warmup_fraction": 0.4, "base_lr": 8e-3}, {"warmup_fraction": 0.6, "base_lr": 8e-3},
            {"weight_decay": 0.01}, {"clip": 0.1},
        ],
        "quickstart": [{}, {"warmup_fraction": 0.25}, {"warmup_fraction": 0.4}],
        "paper": [{"base_lr": 2e-3}, {"base_lr": 2e-3, "warmup_fraction": 0.6}],
    }  # fmt: skip
    points = [{"ratios": name, **change} for name, changes in arms.items() for change in changes]
    points += [{"ratios": "vo=0.1,norm=8,emb=16,head=8"}, {"ratios": "vo=0.1,norm=8,emb=8,head=16"}]
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(
                lambda point: run(out, replace(preset, optim=replace(preset.optim, **point)), point), points
            )
        )
    about = {"command": " ".join(sys.argv), **describe_environment("cpu"), "config": preset.to_dict()}
    write_json_atomic(DATA / "edges.json", {**about, "runs": runs})


def base_config() -> TrainConfig:
    preset = get_preset("quickstart")
    # The paper's settings where the search starts, not those that the preset took from its result.
    optim = replace(preset.optim, base_lr=BASE_LR, ratios="uniform", warmup_start="zero", **BASELINE_START)
    return replace(preset, device="cpu", precision="bf16", report_to="none", optim=optim)


def with_ratios(point: dict[str, float]) -> TrainConfig:
    config = base_config()
    spelled = ",".join(f"{block}={ratio:g}" for block, ratio in point.items())
    return replace(config, optim=replace(config.optim, ratios=spelled))


def with_settings(point: dict[str, float]) -> TrainConfig:
    config = base_config()
    return replace(config, optim=replace(config.optim, **point))


def search(out: Path, start: dict[str, float], moves: dict[str, Any], configure: Any) -> dict[str, Any]:
    """Coordinate search: try each move from the best point so far, and keep what lowers the loss on tune."""
    best, runs = dict(start), [run(out, configure(start), start)]
    lowest = tune_loss(runs[0])
    for name, values in moves.items():
        tried = [run(out, configure({**best, name: value}), {**best, name: value}) for value in values]
        runs += tried
        better = min(tried, key=tune_loss)
        if tune_loss(better) < lowest:
            best, lowest = better["point"], tune_loss(better)
    return {"best": best, "tune_loss": lowest, "base_lr": BASE_LR, "runs": runs}


if __name__ == "__main__":
    main()
