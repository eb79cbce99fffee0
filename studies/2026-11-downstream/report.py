"""Write README.md, details.md and the figure from data/runs and data/scores.

python studies/2026-11-downstream/report.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from arms import Arm
from comparison_tables import table, thousands
from gaps import gap, gap_cell
from items import TASKS
from paired import Values, paired, standard_error, values
from plan import HORIZON, SEEDS, ladder, models
from run import RESULTS
from score import SCORES
from text_runs import load
from tuning import Results

from blockwise_lr import drawing
from pages import filled, image, write_pages

HERE = Path(__file__).parent
MEASURES = (("cloze", "acc"), ("continuation", "acc_norm"), ("pairs", "acc"))
"""The measure of each task that is reported first."""

ALSO = (("continuation", "acc"), ("pairs", "acc_norm"))
CHANCE = {"cloze": 0.0, "continuation": 0.25, "pairs": 0.5}
PAIRS = (
    ("half", "uniform"),
    ("measured", "uniform"),
    ("half", "uniform, longer"),
    ("uniform, longer", "uniform"),
)
"""Who is compared with whom, the baseline second. The longer uniform run has the loss of `half`, not of `measured`."""


@dataclass(frozen=True)
class Model:
    """One arm with its runs and scores, by seed."""

    arm: Arm
    runs: Mapping[int, Mapping[str, Any]]
    scores: Mapping[int, Mapping[str, Any]]

    def values(self, task: str, kind: str) -> Values:
        """Return one number an item, by seed."""
        return {seed: values(score["tasks"][task], kind) for seed, score in self.scores.items()}

    def losses(self, name: str) -> dict[int, float]:
        """Return a loss by seed: "tune", "val", "code", or "code, fine-tuned"."""
        if name in ("tune", "val"):
            return {seed: _number(run[f"{name}_loss"]) for seed, run in self.runs.items()}
        found = {seed: score["code"] for seed, score in self.scores.items()}
        if name == "code":
            return {seed: _number(each["val_loss"]) for seed, each in found.items()}
        return {seed: _number(each["fine_tuned"]["val_loss"]) for seed, each in found.items()}


def _number(loss: float | None) -> float:
    return math.inf if loss is None else float(loss)


LOSSES = ("tune", "val", "code", "code, fine-tuned")


def compared(results: Results, scores: Results, tuning_runs: Results) -> dict[str, Model]:
    """Return every arm that has at least one run, by name."""
    found = {}
    for name, first in models(results, tuning_runs).items():
        names = {seed: replace(first, seed=seed).name for seed in SEEDS}
        runs = {seed: results.runs[arm] for seed, arm in names.items() if arm in results.runs}
        own = {seed: scores.runs[arm] for seed, arm in names.items() if arm in scores.runs}
        if runs:
            found[name] = Model(first, runs, own)
    return found


def losses_table(found: Mapping[str, Model]) -> str:
    """One row a model: its steps and its mean losses."""
    rows = []
    for name, model in found.items():
        every = [model.losses(loss) for loss in LOSSES]
        cells = [f"{sum(each.values()) / len(each):.3f}" if each else "-" for each in every]
        rows.append([name, thousands(model.arm.steps), *cells])
    return table(["model", "steps", *LOSSES], rows)


def loss_gaps_table(found: Mapping[str, Model]) -> str:
    """One row a pair: the nats that the first wins over the second, over paired seeds."""
    rows = []
    for one, other in PAIRS:
        if one in found and other in found:
            gaps = [(found[other].losses(loss), found[one].losses(loss)) for loss in LOSSES[1:]]
            cells = [gap_cell(gap(*each), len(each[1])) if all(each) else "-" for each in gaps]
            rows.append([one, other, *cells])
    return table(["model", "over", *LOSSES[1:]], rows)


def accuracy_table(found: Mapping[str, Model]) -> str:
    """One row a model: its accuracy on every task, with the standard error over items, and the cloze's perplexity."""
    rows = []
    for name, model in found.items():
        if not model.scores:
            continue
        cells = []
        for task, kind in MEASURES:
            own = model.values(task, kind)
            cells.append(f"{_mean(own):.1%} ± {standard_error(own):.1%}")
        rows.append([name, *cells, f"{math.exp(-_mean(model.values('cloze', 'log_likelihood'))):.1f}"])
    chance = ["chance", *(f"{CHANCE[task]:.0%}" for task, _ in MEASURES), "-"]
    return table(["model", *TASKS, "cloze: perplexity"], [chance, *rows] if rows else [])


def _mean(own: Values) -> float:
    return float(np.mean([each.mean() for each in own.values()]))


def differences_table(found: Mapping[str, Model], measures: tuple[tuple[str, str], ...] = MEASURES) -> str:
    """One row a pair and task: the difference of the accuracies, with both intervals, in percentage points."""
    rows = []
    for one, other in PAIRS:
        for task, kind in measures:
            if one not in found or other not in found:
                continue
            both = found[other].values(task, kind), found[one].values(task, kind)
            if not both[0].keys() & both[1].keys():
                continue
            each = paired(*both)
            low, high = each.items95
            over = each.seeds.ci95
            between = "-" if over is None else f"{100 * over[0]:+.1f} to {100 * over[1]:+.1f}"
            rows.append(
                [
                    one,
                    other,
                    f"{task}, {kind}",
                    f"{100 * each.mean:+.1f}",
                    f"{100 * low:+.1f} to {100 * high:+.1f}",
                    between,
                ]
            )
    return table(["model", "over", "task", "points", "95 % over items", "95 % over seeds"], rows)


def ladder_table(results: Results, tuning_runs: Results) -> str:
    """The uniform runs that showed how many steps reach the loss of `half`, at seed 0."""
    found = models(results, tuning_runs)
    if "uniform" not in found or "half" not in found:
        return ""
    arms, _ = ladder(found["uniform"], found["half"], results)
    rows = [
        ["uniform" if arm.ratios == {} else "half", f"{arm.steps}", f"{arm.base_lr:.3g}", f"{loss:.4f}"]
        for arm in [found["half"], *arms]
        if (loss := results.loss(arm)) is not None
    ]
    return table(["rule", "steps", "base LR", "tune loss"], rows)


def runs_table(found: Mapping[str, Model]) -> str:
    """Every model: its settings, losses and the learning rate of its fine-tuning."""
    rows = []
    for name, model in found.items():
        for seed, run in model.runs.items():
            score = model.scores.get(seed)
            rate = "-" if score is None else f"{score['code']['fine_tuned']['arm']['base_lr']:.3g}"
            cells = [f"{model.arm.steps}", f"{model.arm.base_lr:.3g}", f"{model.arm.warmup:.0%}", f"{seed}"]
            ends = [f"{_number(run[key]):.4f}" for key in ("tune_loss", "val_loss")]
            rows.append([name, *cells, *ends, rate])
    header = ["model", "steps", "base LR", "warm-up", "seed", "tune loss", "val loss", "fine-tuning LR"]
    return table(header, rows)


def draw(found: Mapping[str, Model], path: Path) -> bool:
    """Draw accuracy against val loss, one point a model and seed, a panel a task; return whether there are any."""
    if not any(model.scores for model in found.values()):
        return False
    with drawing.figure((3.2 * len(MEASURES), 3.6)) as made:
        panels = made.subplots(1, len(MEASURES))
        for axes, (task, kind) in zip(panels, MEASURES):
            for number, (name, model) in enumerate(found.items()):
                losses = model.losses("val")
                own = model.values(task, kind)
                style = drawing.series_style(number) | {"linestyle": "none"}
                axes.plot(
                    [losses[seed] for seed in own],
                    [100 * float(each.mean()) for each in own.values()],
                    marker="o",
                    label=name,
                    **style,
                )
            axes.set_title(task)
            axes.set_xlabel("val loss")
        panels[0].set_ylabel("accuracy, %")
        panels[0].legend(fontsize="small")
        drawing.save(made, path)
    return True


def tables(results: Results, scores: Results, tuning_runs: Results) -> dict[str, str]:
    """Return every table of the pages by its name in the templates."""
    found = compared(results, scores, tuning_runs)
    every = {
        "losses": losses_table(found),
        "loss_gaps": loss_gaps_table(found),
        "accuracies": accuracy_table(found),
        "differences": differences_table(found),
        "also": differences_table(found, ALSO),
        "ladder": ladder_table(results, tuning_runs),
        "runs": runs_table(found),
    }
    counts = {
        task: f"{len(each.scores[0]['tasks'][task]['acc'])}"
        for each in found.values()
        if 0 in each.scores
        for task in TASKS
    }
    return filled(every) | {f"items_{task}": counts.get(task, "-") for task in TASKS}


def main() -> None:
    results = load(RESULTS)
    if not results.runs:
        raise SystemExit(
            f"no run has ended in {RESULTS}: make them by run.py and score.py, then write the page"
        )
    scores, tuning_runs = load(SCORES), load(HORIZON / "data" / "runs")
    there = draw(compared(results, scores, tuning_runs), HERE / "accuracy-against-loss.png")
    # The templates name no page or figure that may not be there yet.
    shown = {
        "figure": image("Accuracy on every task against val loss", "accuracy-against-loss.png", there),
        "to_details": "[details](details.md)",
        "to_answer": "[answer](README.md)",
    }
    write_pages(HERE, tables(results, scores, tuning_runs) | shown)


if __name__ == "__main__":
    main()
