"""Show DirectionalReports: as tables on the terminal, and as a figure over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwise_lr.blocks import Block
from blockwise_lr.directional.ratio_display import draw_ratios, ratio_cell, run_ratios
from blockwise_lr.directional.slope import FARTHEST, Slope, short
from blockwise_lr.drawing import block_colour, figure, log_ticks, save
from blockwise_lr.extras import missing

if TYPE_CHECKING:
    from rich.table import Table

    from blockwise_lr.directional.directional_report import DirectionalReport

COLUMNS = 6


def directional_table(report: DirectionalReport) -> Table:
    """Return a table of one report, with one row per block.

    The columns are the current learning rate of the block, its best one if all other blocks are fixed, and its best one
    if the other blocks move at their current learning rates, with its standard error. The last column is the verdict.

    Raises:
        ModuleNotFoundError: rich is missing. The message names the extra to install.

    Example:
        >>> from rich.console import Console                            # doctest: +SKIP
        >>> Console().print(directional_table(report))                  # doctest: +SKIP
    """
    from_rich = _rich()
    batches = "1 batch" if report.batches == 1 else f"{report.batches} batches"
    step = "" if report.step is None else f"step {report.step:,}, "
    columns = [
        from_rich.Column(name, justify="right", no_wrap=True)
        for name in ("current", "others\nfixed", "others\nmoving")
    ]
    made: Table = from_rich.Table(
        "block",
        *columns,
        "verdict",
        title=f"{step}along the optimizer's update, {report.samples:,} samples in {batches}:\n"
        "learning rate: current, and best if the other blocks\nare fixed or moving",
        title_justify="left",
        title_style="italic",
    )
    for block, slope in report.items():
        made.add_row(
            block.value,
            f"{slope.lr:.2e}",
            f"{slope.best_lr:.1e}",
            _with_error(slope.best_lr_beside, slope.best_lr_beside_stderr),
            slope.verdict,
        )
    return made


def shown_report(reports: Sequence[DirectionalReport]) -> DirectionalReport:
    """Return the report at the highest learning rate; the last one if several have it.

    Near the end of a schedule, learning rates are low and most blocks could take more, which is not informative.
    """
    return max(reversed(reports), key=lambda report: max(slope.lr for slope in report.values()))


def directional_run_table(reports: Sequence[DirectionalReport]) -> Table:
    """Return a table of one run: the factor by which each learning rate could change, and the ratios to train with.

    Args:
        reports: reports of one run, earliest first. The table shows at most COLUMNS of them; the ratios use all.

    Raises:
        ModuleNotFoundError: rich is missing. The message names the extra to install.
    """
    from_rich = _rich()
    count = min(COLUMNS, len(reports))
    shown = [reports[round(i * (len(reports) - 1) / max(count - 1, 1))] for i in range(count)]
    ratios = run_ratios(reports)
    steps = ["" if report.step is None else f"{report.step:,}" for report in shown]
    columns = [from_rich.Column(name, justify="right", no_wrap=True) for name in (*steps, "ratio")]
    made: Table = from_rich.Table(
        "block",
        *columns,
        title="best rate while the others move / current rate, by step\n"
        "(-: raises the loss); ratio: best for all together,\n"
        "in the mean over FFN's (*: not determined, measured's)",
        title_justify="left",
        title_style="italic",
    )
    for block in (block for block in Block if any(block in report for report in reports)):
        cells = [_factor(report[block]) if block in report else "" for report in shown]
        made.add_row(block.value, *cells, ratio_cell(ratios, block) if ratios else "")
    return made


def _factor(slope: Slope) -> str:
    if not slope.lr:
        return "lr 0"
    if slope.factor_beside > FARTHEST:
        return f">x{short(FARTHEST)}"
    return f"x{short(slope.factor_beside)}" if slope.factor_beside > 0 else "-"


def _rich() -> Any:
    try:
        from rich import table
    except ModuleNotFoundError:
        raise missing("tables need", "rich", "train") from None
    return table


def _with_error(value: float, stderr: float) -> str:
    return f"{value:.1e}" if math.isnan(stderr) else f"{value:.1e} ± {stderr:.1e}"


def plot_directional(reports: Sequence[DirectionalReport], path: str | Path) -> Path:
    """Save a figure of the best learning rate of each block, divided by the current one, over training.

    One panel has the best rate if all other blocks are fixed, and one that if they move at their current rates. For
    several reports, a third one has the ratios that follow, with their intervals.

    Args:
        reports: reports of one run, earliest first; at least one.
        path: path of the figure, ending in .png, .svg or .pdf.

    Returns:
        The path of the figure.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: there is no report, or the path has another ending.
    """
    if not reports:
        raise ValueError("no reports; expected one or more")
    ratios = run_ratios(reports) if len(reports) > 1 else None
    with figure((9.6 if ratios is None else 14.0, 4.4)) as made:
        panels = made.subplots(1, 2 if ratios is None else 3)
        for axes, others_move in zip(panels, (False, True)):
            draw_directional(axes, reports, others_move=others_move)
        if ratios is not None:
            draw_ratios(panels[2], ratios)
        made.axes[1].set_ylabel("")
        made.axes[1].legend(ncols=2, fontsize=8)
        made.suptitle("▼: the update raises the loss at any learning rate", fontsize=9)
        return save(made, path)


def draw_directional(axes: Any, reports: Sequence[DirectionalReport], *, others_move: bool) -> None:
    """Draw one panel of :func:`plot_directional`.

    Args:
        axes: matplotlib axes to draw on.
        reports: reports of one run, earliest first.
        others_move: whether the other blocks move at their current learning rates (True) or are fixed (False).
    """
    blocks = [block for block in Block if any(block in report for report in reports)]
    every = [s for r in reports for s in r.values()]
    factors = [f for s in every for f in (s.factor, s.factor_beside) if math.isfinite(f) and f > 0]
    low, high = min([*factors, 0.1]) / 2, max([*factors, 10.0]) * 2
    strips = low / 1.35 ** (len(blocks) + 1)  # below this range, one row of ▼ per block
    axes.axhline(1.0, color="#555555", linewidth=0.9)
    for number, block in enumerate(blocks):
        found = [(x, report[block]) for x, report in enumerate(reports) if block in report]
        # Blocks are shifted sideways, so that error bars of the same step do not overlap.
        at = [_step(reports, x) + _nudge(reports, number, len(blocks)) for x, _ in found]
        slopes = [slope for _, slope in found]
        shown = [slope.factor_beside if others_move else slope.factor for slope in slopes]
        errors = [slope.best_lr_beside_stderr if others_move else slope.best_lr_stderr for slope in slopes]
        relative = [0.0 if math.isnan(e) or not s.lr else e / s.lr for s, e in zip(slopes, errors)]
        _draw_block(axes, block, at, shown, relative, strips * 1.35 ** (len(blocks) - number))
    axes.axhline(low, color="#BBBBBB", linewidth=0.6)
    axes.set_ylim(strips, high)
    log_ticks(axes.yaxis)
    axes.set_ylabel("best learning rate / current one")
    if len(reports) > 1:
        axes.set_xlabel("step")
    else:
        axes.set_xticks([])
    axes.set_title(
        "if the other blocks move at their current rates" if others_move else "if the other blocks are fixed",
        fontsize=9,
        loc="left",
    )


def _draw_block(
    axes: Any,
    block: Block,
    at: Sequence[float],
    factors: Sequence[float],
    errors: Sequence[float],
    strip: float,
) -> None:
    colour = block_colour(block)
    shown = [f if f > 0 and math.isfinite(f) else math.nan for f in factors]
    below = [min(error, 0.9 * f) if f == f else 0.0 for error, f in zip(errors, shown)]
    axes.errorbar(at, shown, yerr=[below, errors], color=colour, marker="o", markersize=4, capsize=2,
                  linewidth=1.2, label=block.value)  # fmt: skip
    lost = [x for x, f in zip(at, factors) if f <= 0 and math.isfinite(f)]
    axes.plot(lost, [strip] * len(lost), linestyle="none", marker="v", markersize=5, color=colour)


def _step(reports: Sequence[DirectionalReport], index: int) -> float:
    step = reports[index].step
    return float(index if step is None else step)


def _nudge(reports: Sequence[DirectionalReport], number: int, blocks: int) -> float:
    width = max(_step(reports, len(reports) - 1) - _step(reports, 0), 1.0) * (0.02 if len(reports) > 1 else 1)
    return (number / max(blocks - 1, 1) - 0.5) * width
