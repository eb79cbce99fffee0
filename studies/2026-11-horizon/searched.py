"""The ratios that were searched at each horizon, and how far each can move for a hundredth of a nat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arms import RULES
from plan import SEARCHES, SPACE, point_of, search, tuning
from tuned import HORIZONS, MODELS, SEARCHED, Tuned, gap
from tuning import Results

from blockwise_lr import drawing
from blockwise_lr.blocks import Block
from blockwise_lr.optim.ratios import MEASURED_RATIOS
from blockwise_lr.tune.space import Point
from blockwise_lr.tune.valley import Valley, fit_valleys

_NOISE = 0.005  # nats: how much a seed moves one arm more than another


@dataclass(frozen=True)
class Found:
    """The best point of a search, with the valley of each block around it."""

    best: Point
    valleys: dict[str, Valley]

    def ratio(self, block: str) -> tuple[float, tuple[float, float] | None]:
        """Return the block's ratio and between which ratios the loss stays within 0.01 nats; None: not known."""
        value = self.best.ratios.get(block, 1.0)
        moves = self.valleys[block].moves
        return value, None if moves is None else (value * 2 ** moves[0], value * 2 ** moves[1])


def found_ratios(found: dict[tuple[str, int, str], Tuned], results: Results) -> dict[tuple[str, int], Found]:
    """Return the result of every search that has ended, by shape and steps."""
    every = {}
    for shape, steps in SEARCHES:
        if (shape, steps, SEARCHED) not in found:
            continue
        arms = [*search(shape, steps, results)[0]]
        for rule in RULES:
            arms += tuning(shape, steps, rule, results)[0]
        losses = {arm.name: loss for arm in arms if (loss := results.loss(arm)) is not None}
        points = {arm.name: point_of(arm) for arm in arms if arm.name in losses}
        best = point_of(found[shape, steps, SEARCHED].arm)
        valleys = fit_valleys(SPACE, list(points.values()), [losses[n] for n in points], best, noise=_NOISE)
        every[shape, steps] = Found(best, valleys)
    return every


def searched_table(found: dict[tuple[str, int, str], Tuned], results: Results) -> list[list[str]]:
    """One row a search: what it won over tuned uniform, its base learning rate and the ratio of every block."""
    rows = []
    for (shape, steps), each in found_ratios(found, results).items():
        uniform = found.get((shape, steps, "uniform"))
        won = None if uniform is None else gap(uniform, found[shape, steps, SEARCHED]).mean
        cells = []
        for block in SPACE.blocks:
            value, between = each.ratio(block)
            width = "not decided" if between is None else f"{between[0]:.2g} to {between[1]:.2g}"
            cells.append(f"{value:.2g} ({width})")
        rows.append(
            [
                MODELS[shape],
                f"{steps:,}".replace(",", " "),
                "-" if won is None else f"{won:+.3f}",
                f"{each.best.base_lr:.2g}",
                *cells,
            ]
        )
    return rows


def draw_ratios(found: dict[tuple[str, int, str], Tuned], results: Results, path: Path) -> None:
    """Draw the searched ratio of each block against the length of the run, with its valley, a panel a block."""
    every = found_ratios(found, results)
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
