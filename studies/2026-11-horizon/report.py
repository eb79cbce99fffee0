"""Write README.md, details.md and the figures from the runs in data/runs.

python studies/2026-11-horizon/report.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from blockwise_lr import drawing
from blockwise_lr.compare.over_seeds import LossGap, SpeedUpOverSeeds

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from again import AGAIN
from arms import Arm
from baseline import ADAMW, gains_of_changes
from comparison_tables import table, thousands
from copying_gains import copying_sentence, copying_table, draw_copying
from exponents import exponents_table, prediction_table
from gaps import gap, gap_cell
from plan import variants
from prediction import tokens_a_parameter
from ratio_fits import ratio_fits_table
from rules import COMPARED, SPACE, tuning
from run import RESULTS
from searched import draw_ratios, searched_table, searches
from text_runs import load
from tuned import (
    HORIZONS,
    MODELS,
    OTHERS,
    SEARCHED,
    Tuned,
    all_tuned,
    planned,
    speedup,
    tuned,
)
from tuning import Results
from wider import WIDE, wider_table

from pages import filled, image, wrapped, write_pages

HERE = Path(__file__).parent
COPYING = HERE / "learning-to-copy.png"
RATIOS_FIGURE = """
![The searched ratio of each block against the steps of the run](ratio-over-length.png)

The bars are those of 0.01 nats. The lines are uniform (solid), `half` (dashed) and `measured` (dotted)."""


def _speed_cell(found: SpeedUpOverSeeds) -> str:
    if found.value is None:
        return "-"
    sign = {"exact": "", "at_least": "at least ", "at_most": "at most "}[found.bound or "exact"]
    interval = f" ({found.ci95[0]:.2f} to {found.ci95[1]:.2f})" if found.ci95 else ""
    return f"{sign}{found.value:.2f}x{interval}"


def gains_table(found: dict[tuple[str, int, str], Tuned]) -> str:
    """A table a model, one row a rule and one column a horizon: what every rule wins over tuned uniform."""
    return _by_model(found, ("tokens a parameter", "uniform: val loss", *OTHERS), _gains)


def _gains(found: dict[tuple[str, int, str], Tuned], shape: str, steps: int) -> list[str]:
    """The cells of one model and horizon."""
    uniform = found[shape, steps, "uniform"].losses
    cells = [
        gap_cell(gap(uniform, other.losses), len(other.losses))
        if (other := found.get((shape, steps, rule)))
        else ("not tuned yet" if planned(shape, steps, rule) else "-")
        for rule in OTHERS
    ]
    return [f"{tokens_a_parameter(shape, steps):.2g}", f"{sum(uniform.values()) / len(uniform):.3f}", *cells]


def speedups_table(found: dict[tuple[str, int, str], Tuned]) -> str:
    """A table a model, one row a rule: how many times as many steps uniform needs for the rule's loss."""
    return _by_model(
        found,
        OTHERS,
        lambda found, shape, steps: [
            _speed_cell(speedup(shape, steps, rule, found)) if (shape, steps, rule) in found else "-"
            for rule in OTHERS
        ],
    )


def _by_model(
    found: dict[tuple[str, int, str], Tuned],
    titles: Sequence[str],
    cells: Callable[[dict[tuple[str, int, str], Tuned], str, int], list[str]],
) -> str:
    """A table a model: one row a title, and one column of cells a horizon at which uniform is tuned."""
    tables = []
    for shape, name in MODELS.items():
        horizons = [steps for steps in HORIZONS if (shape, steps, "uniform") in found]
        if not horizons:
            continue
        columns = [cells(found, shape, steps) for steps in horizons]
        header = [f"LLaMA of {name}", *(f"{thousands(steps)} steps" for steps in horizons)]
        tables.append(table(header, [[title, *row] for title, *row in zip(titles, *columns)]))
    return "\n\n".join(tables)


def settings_table(found: dict[tuple[str, int, str], Tuned]) -> str:
    """One row a model and horizon: the base learning rate and warm-up that were chosen for every rule."""
    rows = []
    for shape in MODELS:
        for steps in HORIZONS:
            chosen = {
                rule: found[shape, steps, rule].arm
                for rule in (*COMPARED, SEARCHED)
                if (shape, steps, rule) in found
            }
            if chosen:
                cells = [
                    f"{a.base_lr:.2g}, {a.warmup:.0%}" if (a := chosen.get(rule)) else "-"
                    for rule in (*COMPARED, SEARCHED)
                ]
                rows.append([MODELS[shape], thousands(steps), *cells])
    return table(["model", "steps", *COMPARED, SEARCHED], rows)


def baseline_table(results: Results) -> str:
    """What the uniform baseline gains by another weight decay or beta2, in nats of the tune loss."""
    rows = []
    for shape in MODELS:
        for steps in HORIZONS:
            _, best = tuning(shape, steps, "uniform", results)
            if best is None:
                continue
            cells = gains_of_changes(best, ADAMW, results)
            if set(cells) != {"-"}:
                rows.append([MODELS[shape], thousands(steps), *cells])
    return table(["model", "steps", *ADAMW], rows)


def variants_table(results: Results) -> str:
    """What other decays, floors and moving ratios gain over the same arm without them, in nats of val loss."""
    rows = []
    for steps in (1200, 4800):
        for rule in ("half", "measured"):
            best = tuned("llama-600k", steps, rule, results)
            if best is None:
                continue
            cells = []
            for changes in variants(best.arm).values():
                run = results.runs.get(replace(best.arm, **changes).name)
                cells.append("-" if run is None else f"{best.losses[0] - run['val_loss']:+.3f}")
            if set(cells) != {"-"}:
                rows.append([thousands(steps), rule, *cells])
    return table(["steps", "rule", *variants(Arm("", 1, 1.0))], rows)


def runs_table(results: Results) -> str:
    """Every run, in the order of model, steps, rule and learning rate."""
    names = {tuple(sorted(ratios.items())): name for name, ratios in COMPARED.items()}
    models = {**MODELS, **WIDE}

    def key(run: dict[str, object]) -> tuple[object, ...]:
        arm = Arm(**run["arm"])  # type: ignore[arg-type]
        return (
            list(models).index(arm.shape),
            arm.steps,
            str(sorted(arm.ratios.items())),
            arm.base_lr,
            arm.seed,
        )

    rows = []
    for run in sorted((dict(run) for run in results.runs.values()), key=key):
        arm = Arm(**run["arm"])
        rule = names.get(tuple(sorted(arm.ratios.items())), "searched")
        usual = Arm(arm.shape, arm.steps, arm.base_lr, arm.ratios, arm.warmup, arm.seed).to_dict()
        other = [f"{name} {value}" for name, value in arm.to_dict().items() if value != usual[name]]
        rows.append(
            [
                models[arm.shape],
                f"{arm.steps}",
                rule,
                f"{arm.base_lr:.3g}",
                f"{arm.warmup:.0%}",
                f"{arm.seed}",
                ", ".join(other),
                *(
                    "diverged" if run[loss] is None else f"{run[loss]:.4f}"
                    for loss in ("tune_loss", "val_loss")
                ),
            ]
        )
    return table(
        ["model", "steps", "ratios", "base LR", "warm-up", "seed", "other", "tune loss", "val loss"], rows
    )


def draw_gains(found: dict[tuple[str, int, str], Tuned], path: Path) -> None:
    """Draw the nats won over tuned uniform against the length of the run, a panel a model."""
    shapes = [shape for shape in MODELS if list(_lines(found, shape))]
    if not shapes:
        return  # nothing is tuned yet
    longest = max(steps for shape in shapes for _, points in _lines(found, shape) for steps, _ in points)
    shown = [steps for steps in HORIZONS if steps <= longest]
    with drawing.figure((3.6 * max(2, len(shapes)), 4.8)) as made:
        every = made.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
        for axes, shape in zip(every, shapes):
            for number, (rule, points) in enumerate(_lines(found, shape)):
                style = drawing.series_style(number) | {"linestyle": "-"}
                steps = [n * 1.02 ** (number - len(OTHERS) / 2) for n, _ in points]  # bars side by side
                means = [g.mean or 0.0 for _, g in points]
                spread = [0.0 if g.ci95 is None else (g.ci95[1] - g.ci95[0]) / 2 for _, g in points]
                axes.errorbar(
                    steps, means, yerr=spread, marker="o", capsize=3, label=rule, linewidth=2, **style
                )
            axes.axhline(0, color="#777777", linewidth=1)
            axes.set_title(f"LLaMA of {MODELS[shape]} parameters")
            axes.set_xlabel("steps of the run")
            axes.set_xscale("log")
            axes.set_xticks(shown, [thousands(n) for n in shown], minor=False)
            axes.minorticks_off()
        every[0].set_ylabel("nats won over tuned uniform")
        made.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        drawing.save(made, path)


def _lines(
    found: dict[tuple[str, int, str], Tuned], shape: str
) -> Iterator[tuple[str, Sequence[tuple[int, LossGap]]]]:
    for rule in OTHERS:
        points = [
            (steps, gap(found[shape, steps, "uniform"].losses, found[shape, steps, rule].losses))
            for steps in HORIZONS
            if (shape, steps, rule) in found and (shape, steps, "uniform") in found
        ]
        if points:
            yield rule, points


def tables(results: Results) -> dict[str, str]:
    """Return every table of the pages by its name in the templates."""
    found = all_tuned(results)
    every = {
        "gains": gains_table(found),
        "speedups": speedups_table(found),
        "exponents": exponents_table(results),
        "prediction": prediction_table(found),
        "searched": table(
            ["model", "steps", "nats won", "base LR", *(block.upper() for block in SPACE.blocks)],
            searched_table(found, results),
        ),
        "ratio_fits": ratio_fits_table(found, results),
        "wider": wider_table(found, results),
        "settings": settings_table(found),
        "baseline": baseline_table(results),
        "variants": variants_table(results),
        "copying": copying_table(found, results, load(AGAIN)),
        "runs": runs_table(results),
    }
    drawn = searches(found, results)
    return filled(every) | {
        "copying_sentence": wrapped(copying_sentence(found, results, load(AGAIN))),
        "ratios_figure": RATIOS_FIGURE if drawn else "",
        "copying_figure": image(
            "What the runs win by copying, and their val loss", COPYING.name, COPYING.exists()
        ),
    }


def main() -> None:
    results = load(RESULTS)
    found = all_tuned(results)
    draw_gains(found, HERE / "gain-over-length.png")
    draw_ratios(found, results, HERE / "ratio-over-length.png")
    draw_copying(found, results, load(AGAIN), COPYING)
    write_pages(HERE, tables(results))


if __name__ == "__main__":
    main()
