"""Tune the default ratios on the quickstart as the study of the ratio rules tuned the others.

    python studies/2026-11-default-ratios/tune_default.py --out runs/default-ratios
    python studies/2026-11-default-ratios/tune_default.py --report

The grid is that of the ratio rules: GRID times WARMUPS at seed 0, then a factor of sqrt 2 to either side of the best,
by the tune loss. `uniform`, `measured` and `paper` are trained at the settings that were tuned for them there, because
these runs are in fp32 and the earlier ones in bf16. The embedding alone is trained at uniform's rate.

One process trains one run after another and adds each to data/runs.json. It continues where it was cut off. --report
writes README.md from README.template.md, data/runs.json and the two longest runs of the horizon study.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.presets import get_preset

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from kept_runs import run, tune_loss
from model_settings import GRID, WARMUPS

from pages import wrapped

STUDY = Path(__file__).parent
DATA = STUDY / "data" / "runs.json"


@dataclass(frozen=True)
class Point:
    """The ratios of a run, by name, and what is tuned for them."""

    ratios: str
    base_lr: float
    warmup: float


UNIFORM = Point("uniform", 5.66e-3, 0.6)
MEASURED = Point("measured", 2e-3, 0.15)
PAPER = Point("paper", 2e-3, 0.6)
UNCHANGED = replace(UNIFORM, ratios="half")
"""The default ratios at uniform's own rate and warm-up: what a user gets who changes nothing else."""
EMBEDDING = [replace(UNIFORM, ratios="emb=16"), Point("emb=16", 5.66e-3, 0.15)]
"""The embedding alone, with its ratio in `measured`: with nothing else changed, and with the shorter warm-up."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/default-ratios"))
    parser.add_argument("--report", action="store_true", help="write the page and train nothing")
    arguments = parser.parse_args()
    runs = load()
    if arguments.report:
        (STUDY / "README.md").write_text(page(runs))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    while points := missing(runs):
        found = run(arguments.out, config_of(points[0]), asdict(points[0]))
        about = describe_environment("cpu")
        runs.append({**found, "date": about["date"], "cpu": about["hardware"]["cpu"]})
        write_json_atomic(DATA, {**about, "command": " ".join(sys.argv), "runs": runs})


def load() -> list[dict[str, Any]]:
    """Read the runs that have ended."""
    return list(json.loads(DATA.read_text())["runs"]) if DATA.exists() else []


def config_of(point: Point) -> TrainConfig:
    """The quickstart at a point, evaluated at its end only."""
    preset = replace(get_preset("quickstart"), device="cpu", precision="fp32", report_to="none")
    optim = replace(preset.optim, ratios=point.ratios, base_lr=point.base_lr, warmup_fraction=point.warmup)
    return replace(preset, save_every=0, eval_every=0, optim=optim)


def missing(runs: list[dict[str, Any]]) -> list[Point]:
    """Return what is still to be trained, the most telling first."""
    near = (4e-3, 2e-3)
    grid = [Point("half", lr, warmup) for lr in near for warmup in reversed(WARMUPS)]
    grid += [
        Point("half", lr, warmup) for lr in reversed(GRID) if lr not in near for warmup in reversed(WARMUPS)
    ]
    wanted = [grid[0], UNCHANGED, UNIFORM, *grid[1:]]
    done = {Point(**each["point"]): tune_loss(each) for each in runs}
    if all(point in done for point in grid):
        best = min(grid, key=done.__getitem__)
        wanted += [replace(best, base_lr=float(f"{best.base_lr * by:.3g}")) for by in (2**-0.5, 2**0.5)]
    return [point for point in (*wanted, MEASURED, PAPER, *EMBEDDING) if point not in done]


def page(runs: list[dict[str, Any]]) -> str:
    """Return README.md."""
    losses = {Point(**each["point"]): each for each in runs}
    won = {
        point: losses[UNIFORM]["val_loss"] - losses[point]["val_loss"]
        for point in (UNCHANGED, MEASURED, *EMBEDDING)
        if point in losses
    }
    uniform, half = (longest(name) for name in ("aa7f85d9eb4c", "3348c56ff74c"))
    left = len(missing(runs))
    values = {
        "ANSWER": (
            f"With nothing changed but the ratios, `half` wins {won[UNCHANGED]:.3f} nats over 300 steps at the base "
            "learning rate and warm-up that were tuned for uniform. Over 4 800 steps it wins "
            f"{uniform['val_loss'] - half['val_loss']:.3f} nats at one untuned rate. In the short run, `measured` wins "
            + (f"{won[MEASURED]:.3f}." if MEASURED in won else "more.")
            + (
                f" The embedding alone, `emb=16` with all other ratios 1, wins {won[EMBEDDING[0]]:.3f} with nothing "
                f"else changed, and {won[EMBEDDING[1]]:.3f} with a warm-up of 15 %, where no other rate was tried."
                if all(point in won for point in EMBEDDING)
                else ""
            )
            + " All of this is one seed."
        ),
        "TABLE": table(runs),
        "MISSING": f"**{left} of these runs are still to be made**, so the tuning is not complete."
        if left
        else "The tuning is complete: the best base learning rate of `half` has a worse one on both sides.",
        "LONG": "\n".join(
            [
                "| ratios | base LR | warm-up | tune loss | val loss |",
                "| --- | --- | --- | --- | --- |",
                *(
                    f"| `{name}` | {one['arm']['base_lr']:g} | {one['arm']['warmup']:.0%} | {one['tune_loss']:.3f} | "
                    f"{one['val_loss']:.3f} |"
                    for name, one in (("half", half), ("uniform", uniform))
                ),
            ]
        ),
    }
    text = (STUDY / "README.template.md").read_text()
    for name, value in values.items():
        text = text.replace(f"@@{name}@@", wrapped(value) if name in ("ANSWER", "MISSING") else value)
    return text


def longest(name: str) -> dict[str, Any]:
    """Read a run of the horizon study."""
    return dict(json.loads((STUDY.parent / "2026-11-horizon" / "data" / "runs" / f"{name}.json").read_text()))


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a table, the best of each ratios first."""
    lines = ["| ratios | base LR | warm-up | tune loss | val loss |", "| --- | --- | --- | --- | --- |"]
    for each in sorted(runs, key=lambda one: (one["point"]["ratios"], tune_loss(one))):
        point = Point(**each["point"])
        losses = [
            f"{each[key]:.3f}" if each[key] is not None else "diverged" for key in ("tune_loss", "val_loss")
        ]
        lines.append(f"| `{point.ratios}` | {point.base_lr:g} | {point.warmup:.0%} | {' | '.join(losses)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
