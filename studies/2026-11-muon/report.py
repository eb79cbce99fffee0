"""Write README.md, details.md and the figure from the runs in data/runs.

python studies/2026-11-muon/report.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from arms import Arm
from baseline import gains_of_changes
from comparison_tables import other_settings, progress, table
from found_ratios import found_ratios
from gain_figure import draw_gains
from gaps import gap, gap_cell, losses
from plan import BASELINE, COMPARED, HORIZONS, SEEDS, SPACE, MuonArm, search, starts, tuning, two_rates
from run import RESULTS
from text_runs import load
from tuning import Results

from blockwise_lr.compare.over_seeds import LossGap
from pages import bullets, filled, image, write_pages

HERE = Path(__file__).parent
TWO_RATES, SEARCHED = "two rates", "searched"


def chosen(results: Results) -> dict[tuple[int, str], Arm]:
    """Return what was chosen, by steps and rule, where its tuning has ended."""
    found = {(steps, rule): tuning(steps, rule, results)[1] for steps in HORIZONS for rule in COMPARED}
    found |= {(steps, SEARCHED): search(steps, results)[1] for steps in HORIZONS}
    return {key: arm for key, arm in found.items() if arm is not None}


def state(results: Results) -> str:
    """Which rules are tuned at every horizon."""
    found = chosen(results)
    return bullets(
        progress(f"{steps} steps", (*COMPARED, SEARCHED), {rule for n, rule in found if n == steps})
        for steps in HORIZONS
    )


def gains(results: Results) -> dict[int, dict[str, tuple[LossGap, int]]]:
    """Return what every rule wins over the baseline, and at how many seeds, by steps and rule."""
    found = chosen(results)
    every: dict[int, dict[str, tuple[LossGap, int]]] = {}
    for steps in HORIZONS:
        if (steps, TWO_RATES) in found:
            baseline = losses(found[steps, TWO_RATES], results, SEEDS)
            every[steps] = {}
            for rule in (*COMPARED, SEARCHED):
                if rule != TWO_RATES and (steps, rule) in found:
                    other = losses(found[steps, rule], results, SEEDS)
                    every[steps][rule] = gap(baseline, other), len(other)
    return every


def gains_table(results: Results) -> str:
    """One row a horizon: the val loss of the baseline, and what every other rule wins over it."""
    found = chosen(results)
    others = [rule for rule in (*COMPARED, SEARCHED) if rule != TWO_RATES]
    rows = []
    for steps, won in gains(results).items():
        baseline = losses(found[steps, TWO_RATES], results, SEEDS)
        cells = [gap_cell(*won[rule]) if rule in won else "-" for rule in others]
        rows.append([str(steps), f"{sum(baseline.values()) / len(baseline):.3f}", *cells])
    return table(["steps", f"{TWO_RATES}: val loss", *others], rows)


def settings_table(results: Results) -> str:
    """One row a horizon and rule: base learning rate, warm-up, ratios and what else differs from all other rules."""
    rows = [
        [
            str(steps),
            rule,
            f"{arm.base_lr:.2g}",
            f"{arm.warmup:.0%}",
            ", ".join(f"{block.upper()} {ratio:.2g}" for block, ratio in arm.ratios.items()) or "all 1",
            other_settings(arm) or "-",
        ]
        for (steps, rule), arm in sorted(chosen(results).items())
    ]
    return table(["steps", "rule", "base LR", "warm-up", "ratios", "other"], rows)


def baseline_table(results: Results) -> str:
    """What "two rates" gains by each further setting, in nats of the tune loss."""
    found = {steps: two_rates(steps, results)[1] for steps in HORIZONS}
    rows = [
        [str(steps), *gains_of_changes(best, BASELINE, results)]
        for steps, best in found.items()
        if best is not None
    ]
    return table(["steps", *BASELINE], rows)


def searched_table(results: Results) -> str:
    """One row a horizon: the ratio of every block that the search found, with its valley."""
    rows = []
    for steps in HORIZONS:
        arms, best = search(steps, results)
        if best is not None:
            each = found_ratios(best, [*arms, *starts(steps, results)], SPACE, results)
            rows.append([str(steps), f"{best.base_lr:.2g}", *(each.cell(block) for block in SPACE.blocks)])
    return table(["steps", "base LR", *(block.upper() for block in SPACE.blocks)], rows)


def runs_table(results: Results) -> str:
    """Every run, in the order of steps, ratios, learning rate and seed."""
    rows = []
    for run in results.runs.values():
        arm = MuonArm(**run["arm"])
        ratios = ", ".join(f"{block} {ratio:g}" for block, ratio in arm.ratios.items()) or "uniform"
        other = other_settings(arm)
        shown = ["diverged" if run[k] is None else f"{run[k]:.4f}" for k in ("tune_loss", "val_loss")]
        key = (arm.steps, ratios, other, arm.base_lr, arm.warmup, arm.seed)
        cells = [f"{arm.steps}", ratios, other, f"{arm.base_lr:.3g}", f"{arm.warmup:.0%}", f"{arm.seed}"]
        rows.append((key, [*cells, *shown]))
    header = ["steps", "ratios", "other", "base LR", "warm-up", "seed", "tune loss", "val loss"]
    return table(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def tables(results: Results) -> dict[str, str]:
    """Return every table of the pages by its name in the templates."""
    every = {
        "gains": gains_table(results),
        "settings": settings_table(results),
        "baseline": baseline_table(results),
        "searched": searched_table(results),
        "runs": runs_table(results),
    }
    return filled(every) | {"state": state(results)}


def main() -> None:
    results = load(RESULTS)
    if not results.runs:
        raise SystemExit(f"no run has ended in {RESULTS}: make them by run.py, then write the page")
    won = {
        f"{steps} steps": {rule: each for rule, (each, _) in found.items()}
        for steps, found in gains(results).items()
    }
    drawn = draw_gains(won, HERE / "nats-won.png", over="two tuned rates")
    shown = {
        "gains_figure": image("Nats that every rule wins over two tuned rates", "nats-won.png", drawn),
        # The templates name no page that may not be there yet.
        "to_details": "[Details](details.md)",
        "to_answer": "[answer](README.md)",
    }
    write_pages(HERE, tables(results) | shown)


if __name__ == "__main__":
    main()
