"""The figures of the report: loss curves with loss gap and speed-up, tuning curves, learning rates of the blocks.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish. Series also differ in line style.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr import drawing
from blockwise_lr.compare.arms import Series
from blockwise_lr.compare.ratio_figure import draw_ratios, with_moving_ratios
from blockwise_lr.compare.results import Results, RunResult
from blockwise_lr.compare.wording import format_signed, format_speedup
from blockwise_lr.train.presets import Setting

_WIDE, _SMALL = (9.0, 4.6), (6.4, 4.4)
_BASELINE: dict[str, dict[str, Any]] = {
    "N": {"color": "#222222", "linestyle": "-"},
    "2N": {"color": "#8a8a8a", "linestyle": "-"},
    "N/2": {"color": "#222222", "linestyle": (0, (2, 2))},
    "4N": {"color": "#8a8a8a", "linestyle": (0, (2, 2))},
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report: `name`.png is in the comparison's folder; `svg` is the same figure for embedding."""

    name: str
    svg: bytes

    @classmethod
    def draw(
        cls, out: Path, name: str, size: tuple[float, float], function: Callable[..., None], *arguments: Any
    ) -> ReportFigure:
        """Draw a figure by ``function(figure, *arguments)`` and write it as a PNG file into `out`.

        Args:
            out: the folder to write to.
            name: its name, without an ending.
            size: width and height, in inches.
            function, arguments: what draws it.
        """
        with drawing.figure(size) as figure:
            function(figure, *arguments)
            drawing.lay_out(figure)
            drawing.save(figure, out / f"{name}.png")
            svg = io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
        return cls(name, svg.getvalue())


def draw_figures(results: Results, content: Mapping[str, Any], out: Path) -> dict[str, list[ReportFigure]]:
    """Draw every figure and write it as a PNG file into `out`.

    Args:
        results: the finished runs.
        content: the content of compare.json.
        out: the folder to write to.

    Returns:
        A dictionary of lists of figures. "comparisons" has one figure for each of content["comparisons"]. "overview"
        is empty if there is only one comparison. "tuning" is empty without a grid. "lr" has the learning rates, and
        the ratios of arms that change them during the run.
    """
    figures: dict[str, list[ReportFigure]] = {"overview": [], "comparisons": [], "tuning": [], "lr": []}

    def draw(
        group: str, name: str, size: tuple[float, float], function: Callable[..., None], *arguments: Any
    ) -> None:
        figures[group].append(ReportFigure.draw(out, name, size, function, results, *arguments))

    if len(content["comparisons"]) > 1:
        draw("overview", "loss_curves", _WIDE, _draw_overview)
    for i, comparison in enumerate(content["comparisons"], start=1):
        size = _WIDE if len(content["comparisons"]) == 1 else _SMALL
        draw("comparisons", f"loss_arm{i}", size, _draw_comparison, comparison)
    if results.tuning:
        draw("tuning", "tuning", _WIDE, _draw_tuning)
    columns = min(3, len(results.plan.series))
    rows = -(-len(results.plan.series) // columns)
    draw("lr", "learning_rates", (3.2 * columns, 2.6 * rows + 0.5), _draw_learning_rates, rows, columns)
    if moving := with_moving_ratios(results):
        draw("lr", "ratios", (max(4.8, 3.6 * len(moving)), 3.6), draw_ratios, moving)
    return figures


def _style(results: Results, series: Series) -> dict[str, Any]:
    if series.arm == results.plan.arms[0]:
        return {**_BASELINE[series.horizon], "linewidth": 1.8}
    return {**drawing.series_style(results.plan.arms.index(series.arm) - 1), "linewidth": 1.8}


def _label(name: str, width: int = 34) -> str:
    """Return a name wrapped to at most two lines."""
    lines = textwrap.wrap(name, width)
    return "\n".join(lines if len(lines) <= 2 else [lines[0], f"{lines[1][: width - 2]} …"])


def _draw_curves(axes: Any, results: Results, series: Series) -> None:
    """Draw the mean over seeds, each seed as a thin line, and a cross where a run diverged."""
    style, curves = _style(results, series), []
    for run in results.runs_of(series):
        steps, losses = run.curve()
        if len(results.plan.seeds) > 1:
            axes.plot(steps, losses, color=style["color"], linewidth=0.6, alpha=0.35)
        if run.diverged:
            at = run.result.get("diverged_at_step") or (steps[-1] if steps else 0)
            # The cross is on the upper edge of the frame, where the curve of a diverged run leaves it.
            axes.plot([at], [1.0], "x", color=style["color"], markersize=9, markeredgewidth=2.2,
            clip_on=False,
                      transform=axes.get_xaxis_transform(), zorder=6)  # fmt: skip
        curves.append(dict(zip(steps, losses)))
    common = sorted(set.intersection(*map(set, curves)))
    means = [float(np.mean([curve[step] for curve in curves])) for step in common]
    if len(common) == 1:
        style.setdefault("marker", "o")
    axes.plot(common, means, label=_label(series.name), markersize=4, **style)


def _limit_axes(axes: Any, results: Results, shown: list[Series]) -> None:
    """Limit the loss axis to the range from the lowest loss to the losses at 40 % of N.

    Earlier losses fall from ln(vocabulary size) and would hide the differences.
    """
    terminal, early = [], []
    for series in shown:
        for run in results.runs_of(series):
            steps, losses = run.curve()
            if steps and not run.diverged:
                terminal.append(losses[-1])
                early.append(float(np.interp(0.4 * results.plan.base.steps, steps, losses)))
    if terminal:
        low, high = min(terminal), max(early + terminal)
        pad = 0.06 * (high - low) or 0.01
        axes.set_ylim(low - 3.5 * pad, high + pad)
    axes.set_xlim(0, 2.06 * results.plan.base.steps)


def _label_axes(axes: Any, title: str = "") -> None:
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="upper right", fontsize=9)
    if title:
        # The padding leaves room for the crosses on the upper edge.
        axes.set_title(title, fontsize=10, loc="left", pad=10)


def _draw_overview(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    shown = [series for series in results.plan.series if series.horizon in ("N", "2N")]
    for series in shown:
        _draw_curves(axes, results, series)
    _limit_axes(axes, results, shown)
    _label_axes(axes)


def _draw_comparison(figure: Any, results: Results, comparison: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    n = results.plan.base.steps
    by_name = {series.name: series for series in results.plan.series}
    arm, baseline = by_name[comparison["arm"]], by_name[comparison["against"]]
    double = next(s for s in results.plan.series if s.horizon == "2N")
    for series in (double, baseline, arm):
        _draw_curves(axes, results, series)
    _limit_axes(axes, results, [double, baseline, arm])
    _label_axes(axes, _label(f"{arm.name} against {baseline.name}", 60))
    gap, speedup = comparison["loss_gap"]["mean"], comparison["speedup"]
    if gap is None:
        return
    arm_loss = float(np.mean([run.val_loss for run in results.runs_of(arm)]))
    low, high = axes.get_ylim()
    lower = min(arm_loss, arm_loss + gap)
    arrow = {"arrowstyle": "<->", "color": "#333333", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkB": 3}
    # The arrow is just right of N, where the curves of N steps have ended. The labels are below all curves.
    x = 1.015 * n
    axes.plot([n, 1.03 * n], [arm_loss + gap] * 2, color="#333333", linewidth=0.8)
    axes.plot([n, 1.03 * n], [arm_loss] * 2, color="#333333", linewidth=0.8)
    axes.annotate("", (x, arm_loss), (x, arm_loss + gap), arrowprops=arrow)
    text = f"loss gap {format_signed(gap, 3)}"
    label = {"fontsize": 9, "arrowprops": leader, "zorder": 5}
    axes.annotate(text, (x, arm_loss + gap / 2), (0.72 * n, lower - 0.03 * (high - low)),
                  ha="right", va="center", **label)  # fmt: skip
    if speedup["value"] is None:
        return
    end = min(speedup["value"], 2.0) * n
    if abs(end - n) > 0.01 * n:
        axes.annotate("", (end, arm_loss), (n, arm_loss), arrowprops=arrow | {"arrowstyle": "-|>"})
    text = f"speed-up {format_speedup(speedup)}"
    axes.annotate(text, ((n + end) / 2, arm_loss), ((n + end) / 2, low + 0.05 * (high - low)),
                  ha="center", va="center", **label)  # fmt: skip


def _draw_tuning(figure: Any, results: Results) -> None:
    """Draw the tune loss over the base learning rate, with one panel per warm-up of the grid."""
    warmups = results.plan.warmups or (None,)
    grid = figure.subplots(1, len(warmups), sharey=True, squeeze=False)
    for axes, warmup in zip(grid.flat, warmups):
        tried = [(run, result) for run, result in results.tuning if run.setting.warmup_fraction == warmup]
        for series in results.plan.series:
            runs = [(run.setting, result) for run, result in tried if run.series == series]
            _draw_tuning_line(axes, results, series, runs)
        axes.set_xscale("log")
        lrs = sorted({run.base_lr for run, _ in tried} & set(results.plan.base_lrs or ()))
        axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        axes.minorticks_off()
        axes.set_xlabel("base learning rate")
        if warmup is not None:
            axes.set_title(f"warm-up {warmup:.0%}", fontsize=10)
    finite = [result.tune_loss for _, result in results.tuning if not result.diverged]
    if finite:  # one far too large learning rate must not flatten the minimum, which the figure is to show
        low, high = min(finite), float(np.quantile(finite, 0.9))
        pad = 0.08 * (high - low) or 0.01
        grid[0, 0].set_ylim(low - pad, high + 2 * pad)
    grid[0, 0].set_ylabel("terminal tune loss (nats per token)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    # Arms that share a colour differ in dashes, which the marker hides on a short legend line.
    length = 2.0 if len(labels) <= len(drawing.SERIES_COLOURS) + 1 else 5.0
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, ncols=2, handlelength=length)


def _draw_tuning_line(
    axes: Any, results: Results, series: Series, runs: list[tuple[Setting, RunResult]]
) -> None:
    style = {"marker": "o", **_style(results, series)}
    points = sorted((setting.base_lr, result.tune_loss) for setting, result in runs if not result.diverged)
    axes.plot([lr for lr, _ in points], [loss for _, loss in points], markersize=4.5,
              label=_label(series.name), **style)  # fmt: skip
    for setting, result in runs:
        if result.diverged:
            axes.plot([setting.base_lr], [1.0], "x", color=style["color"], markersize=9, markeredgewidth=2.2,
                      clip_on=False, transform=axes.get_xaxis_transform(), zorder=6)  # fmt: skip
        elif setting == results.chosen[series.name]:
            axes.plot([setting.base_lr], [result.tune_loss], "o", markersize=12, markerfacecolor="none",
                      markeredgecolor=style["color"], markeredgewidth=1.6)  # fmt: skip


def _draw_learning_rates(figure: Any, results: Results, rows: int, columns: int) -> None:
    from matplotlib.lines import Line2D

    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    shown: dict[str, str] = {}
    for axes, series in zip(grid.flat, results.plan.series):
        lines = [line for line in results.runs_of(series)[0].metrics if line.get("lr")]
        steps = [line["step"] for line in lines]
        same_lr: dict[tuple[float, ...], list[str]] = {}
        for block in dict.fromkeys(block for line in lines for block in line["lr"]):
            # A log axis cannot show a rate of 0. Two values of float("nan") would not be equal, as one object is.
            values = tuple(line["lr"].get(block) or math.nan for line in lines)
            same_lr.setdefault(values, []).append(block)
        for values, blocks in same_lr.items():
            for i, block in enumerate(blocks):
                shown[block] = drawing.block_colour(block)
                # Blocks with equal learning rates share one line as alternating dashes, so that each is visible.
                turns = "-" if len(blocks) == 1 else (4 * i, (4, 4 * (len(blocks) - 1)))
                axes.plot(steps, values, color=shown[block], linestyle=turns, linewidth=1.8,
                solid_capstyle="butt",
                          dash_capstyle="butt")  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the default needs mathtext
        axes.set_title(_label(series.name, 30), fontsize=9, loc="left")
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(results.plan.series) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("learning rate", fontsize=9)
    handles = [
        Line2D([], [], color=colour, linewidth=2.4, label=block.upper()) for block, colour in shown.items()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=9)
