"""Tune the default ratios on the quickstart as the study of the ratio rules tuned the others.

    python studies/2026-11-default-ratios/tune_default.py --out runs/default-ratios
    python studies/2026-11-default-ratios/tune_default.py --report

The grid is that of the ratio rules: GRID times WARMUPS at seed 0, then a factor of sqrt 2 to either side of the best,
by the tune loss. `uniform`, `measured` and `paper` are trained at the settings that were tuned for them there, because
these runs are in fp32 and the earlier ones in bf16. The embedding alone is tuned after the seeds of the others.

Two runs train at a time, and each is added to data/runs.json. It continues where it was cut off. --report writes
README.md from README.template.md, data/runs.json and the horizon study's runs of this model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blockwise_lr.compare.over_seeds import LossGap
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.presets import get_preset

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from arms import RULES
from comparison_tables import table as markdown_table
from gaps import gap, gap_cell
from kept_runs import run, tune_loss
from model_settings import GRID, WARMUPS

from pages import wrapped

STUDY = Path(__file__).parent
DATA = STUDY / "data" / "runs.json"


@dataclass(frozen=True)
class Point:
    """The ratios of a run, by name, what is tuned for them, and the seed."""

    ratios: str
    base_lr: float
    warmup: float
    seed: int = 0


UNIFORM = Point("uniform", 5.66e-3, 0.6)
MEASURED = Point("measured", 2e-3, 0.15)
PAPER = Point("paper", 2e-3, 0.6)
UNCHANGED = replace(UNIFORM, ratios="half")
"""The default ratios at uniform's own rate and warm-up: what a user gets who changes nothing else."""
EMBEDDING = [replace(UNIFORM, ratios="emb=16"), Point("emb=16", 5.66e-3, 0.15)]
"""The embedding alone, with its ratio in `measured`: with nothing else changed, and with the shorter warm-up."""
SEEDS = (0, 1, 2)


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
    with ThreadPoolExecutor(2) as pool:
        while points := missing(runs):
            for found in pool.map(lambda each: run(arguments.out, config_of(each), asdict(each)), points[:2]):
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
    return replace(preset, seed=point.seed, save_every=0, eval_every=0, optim=optim)


def missing(runs: Sequence[dict[str, Any]]) -> list[Point]:
    """Return what is still to be trained, the most telling first."""
    done = {Point(**each["point"]): tune_loss(each) for each in runs}
    wanted = [UNCHANGED, UNIFORM, *tuning("half", done)[0], MEASURED, PAPER, *EMBEDDING]
    half = tuning("half", done)[1]
    for points in ((UNIFORM, UNCHANGED, EMBEDDING[0]), (MEASURED, EMBEDDING[1], half)):
        wanted += [replace(point, seed=seed) for seed in SEEDS for point in points if point is not None]
    tried, best = tuning("emb=16", done)
    wanted += tried
    if best is not None:
        wanted += [replace(best, seed=seed) for seed in SEEDS]
    return [point for point in dict.fromkeys(wanted) if point not in done]


def tuning(ratios: str, done: dict[Point, float]) -> tuple[list[Point], Point | None]:
    """Return the runs that tune one set of ratios, as far as they are known, and what was chosen."""
    near = (4e-3, 2e-3)
    rates = (*near, *(lr for lr in reversed(GRID) if lr not in near))
    points = [Point(ratios, lr, warmup) for lr in rates for warmup in reversed(WARMUPS)]
    if not all(point in done for point in points):
        return points, None
    best = min(points, key=done.__getitem__)
    points += [replace(best, base_lr=float(f"{best.base_lr * by:.3g}")) for by in (2**-0.5, 2**0.5)]
    return points, min(points, key=done.__getitem__) if all(point in done for point in points) else None


def page(runs: Sequence[dict[str, Any]]) -> str:
    """Return README.md."""
    done = {Point(**each["point"]): tune_loss(each) for each in runs}
    long = longest()
    uniform, half = unchanged(long)
    tuned_half = tuning("half", done)[1]
    lead = gap(by_seed(runs, tuned_half or UNCHANGED), by_seed(runs, EMBEDDING[1]))
    left = len(missing(runs))
    values = {
        "ANSWER": (
            f"With nothing changed but the ratios, `half` wins {spoken(runs, UNCHANGED)} over 300 steps at the base "
            f"learning rate and warm-up that were tuned for uniform, and the embedding alone, `emb=16` with all other "
            f"ratios 1, wins {spoken(runs, EMBEDDING[0])}. With a warm-up of 15 % the embedding alone wins "
            f"{spoken(runs, EMBEDDING[1])}, which is {said(lead)} more than tuned `half`. "
            f"`measured` wins {spoken(runs, MEASURED)} at a rate and a warm-up of its "
            f"own. Over 4 800 steps `half` wins {uniform['val_loss'] - half['val_loss']:.3f} nats with nothing else "
            "changed (one seed)."
        ),
        "WON": markdown_table(
            ["ratios", "base LR", "warm-up", "nats won over uniform"],
            [
                [
                    what,
                    f"{point.base_lr:g}",
                    f"{point.warmup:.0%}",
                    gap_cell(won(runs, point), seeds(runs, point)),
                ]
                for what, point in (
                    ("`half`, nothing else changed", UNCHANGED),
                    ("`half`, tuned", tuned_half),
                    ("`emb=16`, nothing else changed", EMBEDDING[0]),
                    ("`emb=16`, shorter warm-up", EMBEDDING[1]),
                    ("`emb=16`, tuned", tuning("emb=16", done)[1]),
                    ("`measured`", MEASURED),
                )
                if point is not None and point in done
            ],
        ),
        "TABLE": table(runs),
        "MISSING": f"The tuning of `emb=16` has not ended (runs that are known to be missing: {left})."
        if left
        else "The best base learning rate of `half` and of `emb=16` has a worse one on both sides.",
        "LONG": markdown_table(
            ["ratios", "base LR", "warm-up", "tune loss", "val loss"],
            [
                [
                    "`half`" if one["arm"]["ratios"] else "`uniform`",
                    f"{one['arm']['base_lr']:g}",
                    f"{one['arm']['warmup']:.0%}",
                    *(f"{one[of]:.3f}" for of in ("tune_loss", "val_loss")),
                ]
                for one in long
            ],
        ),
    }
    text = (STUDY / "README.template.md").read_text()
    for name, value in values.items():
        text = text.replace(f"@@{name}@@", wrapped(value) if name in ("ANSWER", "MISSING") else value)
    return text


def seeds(runs: Sequence[dict[str, Any]], point: Point) -> int:
    """Return the number of seeds that a point has."""
    return len(by_seed(runs, point))


def by_seed(runs: Sequence[dict[str, Any]], point: Point) -> dict[int, float]:
    """Return the val losses of a point; infinite for a run that diverged."""
    found = {Point(**each["point"]): each["val_loss"] for each in runs}
    at = {seed: found[own] for seed in SEEDS if (own := replace(point, seed=seed)) in found}
    return {seed: float("inf") if loss is None else loss for seed, loss in at.items()}


def won(runs: Sequence[dict[str, Any]], point: Point) -> LossGap:
    """Return the nats that a point wins over uniform, at the seeds that both have."""
    return gap(by_seed(runs, UNIFORM), by_seed(runs, point))


def spoken(runs: Sequence[dict[str, Any]], point: Point) -> str:
    """Return what a point wins over uniform, for a sentence."""
    return said(won(runs, point))


def said(found: LossGap) -> str:
    """Return a difference for a sentence."""
    if found.ci95 is None:
        return f"{found.mean:.3f} nats (one seed)"
    return f"{found.mean:.3f} nats ({found.ci95[0]:.3f} to {found.ci95[1]:.3f})"


def longest() -> list[dict[str, Any]]:
    """Read the horizon study's runs of uniform and `half` on this model over 4 800 steps, the best of each first."""
    runs = [
        json.loads(path.read_text()) for path in (STUDY.parent / "2026-11-horizon/data/runs").glob("*.json")
    ]
    found = [
        each
        for each in runs
        if (each["arm"]["shape"], each["arm"]["steps"], each["arm"]["seed"]) == ("llama-2m", 4800, 0)
        and each["arm"]["ratios"] in ({}, RULES["half"])
    ]
    return sorted(found, key=lambda each: (not each["arm"]["ratios"], tune_loss(each)))


def unchanged(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the best uniform run that has one of `half` at equal settings, and that one."""
    pairs = [
        (one, other)
        for one in runs
        for other in runs
        if not one["arm"]["ratios"]
        and other["arm"]["ratios"]
        and {**other["arm"], "ratios": {}} == one["arm"]
    ]
    return min(pairs, key=lambda pair: tune_loss(pair[0]))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the runs as a table, the best of each ratios first."""
    rows = []
    for each in sorted(runs, key=lambda one: (one["point"]["ratios"], tune_loss(one))):
        point = Point(**each["point"])
        losses = [
            f"{each[key]:.3f}" if each[key] is not None else "diverged" for key in ("tune_loss", "val_loss")
        ]
        rows.append(
            [f"`{point.ratios}`", f"{point.base_lr:g}", f"{point.warmup:.0%}", f"{point.seed}", *losses]
        )
    return markdown_table(["ratios", "base LR", "warm-up", "seed", "tune loss", "val loss"], rows)


if __name__ == "__main__":
    main()
