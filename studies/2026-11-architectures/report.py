"""Write README.md, details.md and the figures from the runs in data/runs and the measurements in data/sharpness.

python studies/2026-11-architectures/report.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import models
from along_the_run import draw_sharpness, experts_sharpness_table, measured, own_table, sharpness_table
from arms import Arm
from baseline import ADAMW, gains_of_changes
from comparison_tables import other_settings, progress, table
from found_ratios import found_ratios
from gain_figure import draw_gains
from gaps import gap, gap_cell, losses
from plan import (
    DENSE,
    IN_PARTS,
    SEARCHED_FROM,
    SEEDS,
    SHAPES,
    SPACES,
    TUNED,
    expert_arms,
    rates,
    search,
    searched_model,
    tuning,
)
from run import RESULTS
from text_runs import load
from tuning import Results

from blockwise_lr.compare.over_seeds import LossGap
from pages import bullets, filled, image, write_pages

HERE = Path(__file__).parent
NAMES = {**models.NAMES, DENSE: "LLaMA (dense)"}
SEARCHED = "searched"


def rules_of(shape: str) -> list[str]:
    """Return the rules of a model; not every model is searched."""
    return [*TUNED, SEARCHED] if IN_PARTS.get(shape, shape) in SPACES else list(TUNED)


def chosen(results: Results) -> dict[tuple[str, str], Arm]:
    """Return what was chosen, by model and rule, where its tuning has ended."""
    found = {
        (shape, rule): (
            search(IN_PARTS.get(shape, shape), results) if rule == SEARCHED else tuning(shape, rule, results)
        )[1]
        for shape in SHAPES
        for rule in rules_of(shape)
    }
    return {key: arm for key, arm in found.items() if arm is not None}


def state(results: Results) -> str:
    """Which rules are tuned on every model."""
    found = chosen(results)
    return bullets(
        progress(NAMES[shape], rules_of(shape), {rule for model, rule in found if model == shape})
        for shape in SHAPES
    )


def gains(results: Results) -> dict[str, dict[str, tuple[LossGap, int]]]:
    """Return what every rule wins over tuned uniform, and at how many seeds, by model and rule."""
    found = chosen(results)
    every: dict[str, dict[str, tuple[LossGap, int]]] = {}
    for shape in SHAPES:
        if (shape, "uniform") in found:
            uniform = losses(found[shape, "uniform"], results, SEEDS)
            every[shape] = {}
            for rule in rules_of(shape):
                if rule != "uniform" and (shape, rule) in found:
                    other = losses(found[shape, rule], results, SEEDS)
                    every[shape][rule] = gap(uniform, other), len(other)
    return every


def gains_table(results: Results) -> str:
    """One row a model: the tuned uniform val loss, and what every rule wins over it."""
    found = chosen(results)
    others = [rule for rule in (*TUNED, SEARCHED) if rule != "uniform"]
    rows = []
    for shape, won in gains(results).items():
        uniform = losses(found[shape, "uniform"], results, SEEDS)
        cells = [gap_cell(*won[rule]) if rule in won else "-" for rule in others]
        rows.append([NAMES[shape], f"{sum(uniform.values()) / len(uniform):.3f}", *cells])
    return table(["model", "uniform: val loss", *others], rows)


def settings_table(results: Results) -> str:
    """One row a model: the base learning rate and warm-up that were chosen for every rule."""
    found = chosen(results)
    rules = [*TUNED, SEARCHED]
    rows = []
    for shape in SHAPES:
        if (shape, "uniform") in found:
            arms = [found.get((shape, rule)) for rule in rules]
            cells = ["-" if arm is None else f"{arm.base_lr:.2g}, {arm.warmup:.0%}" for arm in arms]
            rows.append([NAMES[shape], *cells])
    return table(["model", *rules], rows)


def baseline_table(results: Results) -> str:
    """What the uniform baseline gains by another weight decay or beta2, in nats of the tune loss."""
    found = {shape: rates(shape, "uniform", results)[1] for shape in SHAPES}
    rows = [
        [NAMES[shape], *gains_of_changes(best, ADAMW, results)]
        for shape, best in found.items()
        if best is not None
    ]
    return table(["model", *ADAMW], rows)


def searched_table(results: Results) -> str:
    """One row a search: the base learning rate, and every block's ratio with its valley."""
    blocks = list(dict.fromkeys(block for space in SPACES.values() for block in space.blocks))
    rows = []
    for shape, space in SPACES.items():
        arms, best = search(shape, results)
        if best is not None:
            starts = [rates(searched_model(shape), rule, results)[1] for rule in SEARCHED_FROM]
            arms += [replace(arm, shape=shape) for arm in starts if arm is not None]
            each = found_ratios(best, arms, space, results)
            cells = [each.cell(block) if block in space.blocks else "-" for block in blocks]
            rows.append([NAMES[shape], space.reference.upper(), f"{best.base_lr:.2g}", *cells])
    return table(["model", "over", "base LR", *(block.upper() for block in blocks)], rows)


def experts_table(results: Results) -> str:
    """One row a change: what it wins over `half` in the mixture of experts and in the dense model."""
    found = {shape: expert_arms(shape, results) for shape in ("mixtral", DENSE)}
    rows = []
    for name in dict.fromkeys(name for arms in found.values() for name in arms if name != "half"):
        cells = []
        for arms in found.values():
            own = losses(arms[name], results, SEEDS) if name in arms else {}
            cells.append(gap_cell(gap(losses(arms["half"], results, SEEDS), own), len(own)) if own else "-")
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    return table(["change", *(NAMES[shape] for shape in found)], rows)


def runs_table(results: Results) -> str:
    """Every run, in the order of model, ratios, learning rate and seed."""
    rows = []
    for run in results.runs.values():
        arm = Arm(**run["arm"])
        ratios = ", ".join(f"{block} {ratio:g}" for block, ratio in arm.ratios.items()) or "uniform"
        other = other_settings(arm)
        shown = ["diverged" if run[k] is None else f"{run[k]:.4f}" for k in ("tune_loss", "val_loss")]
        key = (list(NAMES).index(arm.shape), ratios, other, arm.base_lr, arm.warmup, arm.seed)
        cells = [NAMES[arm.shape], ratios, other, f"{arm.base_lr:.3g}", f"{arm.warmup:.0%}", f"{arm.seed}"]
        rows.append((key, [*cells, *shown]))
    header = ["model", "ratios", "other", "base LR", "warm-up", "seed", "tune loss", "val loss"]
    return table(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def tables(results: Results) -> dict[str, str]:
    """Return every table of the pages by its name in the templates."""
    along = measured()
    every = {
        "gains": gains_table(results),
        "settings": settings_table(results),
        "baseline": baseline_table(results),
        "searched": searched_table(results),
        "experts": experts_table(results),
        "experts_sharpness": experts_sharpness_table(along, "mixtral", DENSE),
        "own": own_table(along, NAMES),
        "sharpness": sharpness_table(along, NAMES),
        "runs": runs_table(results),
    }
    return filled(every) | {"state": state(results)}


def main() -> None:
    results = load(RESULTS)
    if not results.runs:
        raise SystemExit(f"no run has ended in {RESULTS}: make them by run.py, then write the page")
    sharp = draw_sharpness(measured(), NAMES, HERE / "sharpness-along-the-run.png")
    won = {
        NAMES[shape]: {rule: each for rule, (each, _) in found.items()}
        for shape, found in gains(results).items()
    }
    drawn = draw_gains(won, HERE / "nats-won.png", over="tuned uniform")
    shown = {
        "gains_figure": image("Nats that every rule wins over tuned uniform", "nats-won.png", drawn),
        "sharpness_figure": image(
            "Average sharpness of each block along the uniform run", "sharpness-along-the-run.png", sharp
        ),
        # The templates name no page that may not be there yet.
        "to_details": "[Details](details.md)",
        "to_answer": "[answer](README.md)",
    }
    write_pages(HERE, tables(results) | shown)


if __name__ == "__main__":
    main()
