"""The ratios that were searched at each horizon, and how far each can move for a hundredth of a nat."""

from __future__ import annotations

from pathlib import Path

from comparison_tables import thousands
from found_ratios import Found, found_ratios
from gaps import gap
from rules import COMPARED, SEARCHES, SPACE, search, tuning
from tuned import HORIZONS, MODELS, SEARCHED, Tuned
from tuning import Results

from blockwise_lr import drawing
from blockwise_lr.blocks import Block
from blockwise_lr.optim.ratios import MEASURED_RATIOS


def searches(found: dict[tuple[str, int, str], Tuned], results: Results) -> dict[tuple[str, int], Found]:
    """Return the result of every search that has ended, by shape and steps."""
    every = {}
    for shape, steps in SEARCHES:
        if best := found.get((shape, steps, SEARCHED)):
            arms = [*search(shape, steps, results)[0]]
            for rule in COMPARED:
                arms += tuning(shape, steps, rule, results)[0]
            every[shape, steps] = found_ratios(best.arm, arms, SPACE, results)
    return every


def searched_table(found: dict[tuple[str, int, str], Tuned], results: Results) -> list[list[str]]:
    """One row a search: what it won over tuned uniform, its base learning rate and the ratio of every block."""
    rows = []
    for (shape, steps), each in searches(found, results).items():
        uniform = found.get((shape, steps, "uniform"))
        won = None if uniform is None else gap(uniform.losses, found[shape, steps, SEARCHED].losses).mean
        rows.append(
            [
                MODELS[shape],
                thousands(steps),
                "-" if won is None else f"{won:+.3f}",
                f"{each.best.base_lr:.2g}",
                *(each.cell(block) for block in SPACE.blocks),
            ]
        )
    return rows


def draw_ratios(found: dict[tuple[str, int, str], Tuned], results: Results, path: Path) -> None:
    """Draw the searched ratio of each block against the length of the run, with its valley, a panel a block."""
    every = searches(found, results)
    if not every:
        return
    with drawing.figure((2.1 * len(SPACE.blocks), 3.2)) as made:
        panels = made.subplots(1, len(SPACE.blocks), sharey=True)
        for axes, block in zip(panels, SPACE.blocks):
            style = drawing.series_style(0) | {"linestyle": "none"}
            for (_, steps), each in every.items():
                value, between = each.ratio(block)
                if between is not None:
                    axes.vlines(steps, *between, color=style["color"], alpha=0.4, linewidth=5)
                axes.plot(steps, value, marker="o", **style)
            measured = MEASURED_RATIOS[Block(block)]
            axes.axhline(measured, color="#777777", linewidth=1, linestyle=":")
            axes.axhline(measured**0.5, color="#777777", linewidth=1, linestyle="--")
            axes.axhline(1, color="#777777", linewidth=1)
            axes.set_title(block.upper())
            axes.set_xscale("log")
            axes.set_yscale("log", base=2)
            axes.set_xticks(HORIZONS[:3], [str(steps) for steps in HORIZONS[:3]], minor=False)
            axes.set_xlim(200, 7200)
            axes.minorticks_off()
        panels[0].set_ylabel("learning rate over FFN's")
        made.supxlabel("steps of the run", fontsize="medium")
        drawing.save(made, path)
