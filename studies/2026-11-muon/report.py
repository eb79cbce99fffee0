"""Write README.md and details.md from the runs in data/runs.

python studies/2026-11-muon/report.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from arms import Arm
from comparison_tables import table
from found_ratios import found_ratios
from gaps import gap, gap_cell, losses
from plan import COMPARED, HORIZONS, SEEDS, SPACE, search, tuning
from run import RESULTS
from text_runs import load
from tuning import Results

from pages import write_pages

HERE = Path(__file__).parent
BASELINE = "two rates"


def chosen(results: Results) -> dict[tuple[int, str], Arm]:
    """Return what was chosen, by steps and rule, "searched" among them, where its tuning has ended."""
    found = {(steps, rule): tuning(steps, rule, results)[1] for steps in HORIZONS for rule in COMPARED}
    found |= {(steps, "searched"): search(steps, results)[1] for steps in HORIZONS}
    return {key: arm for key, arm in found.items() if arm is not None}


def gains_table(results: Results) -> str:
    """One row a horizon: the val loss of the baseline, and what every other rule wins over it."""
    found = chosen(results)
    others = [*(rule for rule in COMPARED if rule != BASELINE), "searched"]
    rows = []
    for steps in HORIZONS:
        if (steps, BASELINE) not in found:
            continue
        baseline = losses(found[steps, BASELINE], results, SEEDS)
        cells = []
        for rule in others:
            own = losses(found[steps, rule], results, SEEDS) if (steps, rule) in found else {}
            cells.append(gap_cell(gap(baseline, own), len(own)) if own else "-")
        rows.append([str(steps), f"{sum(baseline.values()) / len(baseline):.3f}", *cells])
    return table(["steps", f"{BASELINE}: val loss", *others], rows)


def settings_table(results: Results) -> str:
    """One row a horizon and rule: base learning rate, warm-up and ratios."""
    rows = [
        [
            str(steps),
            rule,
            f"{arm.base_lr:.2g}",
            f"{arm.warmup:.0%}",
            ", ".join(f"{block.upper()} {ratio:.2g}" for block, ratio in arm.ratios.items()) or "all 1",
        ]
        for (steps, rule), arm in sorted(chosen(results).items())
    ]
    return table(["steps", "rule", "base LR", "warm-up", "ratios"], rows)


def searched_table(results: Results) -> str:
    """One row a horizon: the ratio of every block that the search found, with its valley."""
    rows = []
    for steps in HORIZONS:
        arms, best = search(steps, results)
        if best is not None:
            starts = [arm for rule in COMPARED if (arm := tuning(steps, rule, results)[1]) is not None]
            each = found_ratios(best, [*arms, *starts], SPACE, results)
            rows.append([str(steps), f"{best.base_lr:.2g}", *(each.cell(block) for block in SPACE.blocks)])
    return table(["steps", "base LR", *(block.upper() for block in SPACE.blocks)], rows)


def runs_table(results: Results) -> str:
    """Every run, in the order of steps, ratios, learning rate and seed."""
    rows = []
    for run in results.runs.values():
        arm = run["arm"]
        ratios = ", ".join(f"{block} {ratio:g}" for block, ratio in arm["ratios"].items()) or "uniform"
        shown = ["diverged" if run[k] is None else f"{run[k]:.4f}" for k in ("tune_loss", "val_loss")]
        key = (arm["steps"], ratios, arm["base_lr"], arm["warmup"], arm["seed"])
        rows.append(
            (
                key,
                [
                    f"{arm['steps']}",
                    ratios,
                    f"{arm['base_lr']:.3g}",
                    f"{arm['warmup']:.0%}",
                    f"{arm['seed']}",
                    *shown,
                ],
            )
        )
    header = ["steps", "ratios", "base LR", "warm-up", "seed", "tune loss", "val loss"]
    return table(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def tables(results: Results) -> dict[str, str]:
    """Return every table of the pages by its name in the templates."""
    every = {
        "gains": gains_table(results),
        "settings": settings_table(results),
        "searched": searched_table(results),
        "runs": runs_table(results),
    }
    return {name: text if text.count("\n") > 1 else "None yet." for name, text in every.items()}


if __name__ == "__main__":
    write_pages(HERE, tables(load(RESULTS)))
