"""The figure of ratios over the steps, for arms that change them during the run (`auto`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockwise_lr import drawing
from blockwise_lr.compare.arms import Series
from blockwise_lr.compare.results import Results


def with_moving_ratios(results: Results) -> list[Series]:
    """Return the series whose runs logged ratios."""
    return [series for series in results.plan.series if _logged(results, series)]


def draw_ratios(figure: Any, results: Results, series: Sequence[Series]) -> None:
    """Draw one panel per series with the ratio of every block; the first seed in full colour, the others fainter."""
    grid = figure.subplots(1, len(series), squeeze=False, sharey=True)[0]
    for axes, each in zip(grid, series):
        for i, run in enumerate(results.runs_of(each)):
            lines = [line for line in run.metrics if line.get("ratios")]
            for block in lines[0]["ratios"] if lines else ():
                axes.plot(
                    [line["step"] for line in lines],
                    [line["ratios"][block] for line in lines],
                    color=drawing.block_colour(block),
                    alpha=1.0 if i == 0 else 0.3,
                    label=block.upper() if i == 0 else None,
                    linewidth=1.6,
                )
        axes.axhline(1.0, color="#777777", linewidth=0.8)
        drawing.log_ticks(axes.yaxis)
        axes.set_title(each.name[:40], fontsize=9, loc="left")
        axes.set_xlabel("optimizer step", fontsize=9)
    grid[0].set_ylabel("ratio", fontsize=9)
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4 * len(series), fontsize=9
    )


def _logged(results: Results, series: Series) -> bool:
    return any(line.get("ratios") for run in results.runs_of(series) for line in run.metrics)
