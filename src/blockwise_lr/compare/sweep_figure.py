"""The figures of a sweep over ratios, drawn from its JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwise_lr import drawing
from blockwise_lr.compare.figures import ReportFigure
from blockwise_lr.compare.ratio_sweeps import TOLERANCE
from blockwise_lr.optim.block_values import digits

_COLUMNS = 3  # panels in a row of the figure
_MOST_LINES = 12
"""Arms in the tuning figure; more could not be told apart."""


def draw_figures(content: Mapping[str, Any], out: Path) -> dict[str, list[ReportFigure]]:
    """Draw every figure and write it as a PNG file into `out`.

    Returns:
        "sweep": the loss of every arm. "tuning": the tune losses of the grid; empty without one.
    """
    figures: dict[str, list[ReportFigure]] = {"sweep": [], "tuning": []}

    sweep = ReportFigure.draw(out, content["kind"], sweep_size(content), draw_sweep, content)
    figures["sweep"].append(sweep)
    if content["tuning"]:
        figures["tuning"].append(ReportFigure.draw(out, "tuning", (9.0, 4.2), _draw_tuning, content))
    return figures


def sweep_size(content: Mapping[str, Any]) -> tuple[float, float]:
    """Return width and height of the figure of a sweep, in inches."""
    if content["kind"] == "ablation":
        return 7.2, 4.2
    panels = len(_curves(content))
    columns = min(_COLUMNS, panels)
    return max(4.8, 3.0 * columns), 2.6 * -(-panels // columns) + 0.4


def _curves(content: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(point["curve"] for point in content["points"] if point["curve"]))


def draw_sweep(figure: Any, content: Mapping[str, Any]) -> None:
    """Draw the valley of every ratio, one panel each, or the loss over the blocks that are switched on."""
    (_draw_robustness if content["kind"] == "robustness" else _draw_ablation)(figure, content)
    figure.supylabel("rise of the loss (nats)", fontsize=9)


def _draw_robustness(figure: Any, content: Mapping[str, Any]) -> None:
    curves = _curves(content)
    columns = min(_COLUMNS, len(curves))
    grid = figure.subplots(-(-len(curves) // columns), columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(grid, curves):
        own = _points(content, curve)
        _draw_line(axes, own, {"color": drawing.block_colour(curve), "linestyle": "-"})
        axes.axhline(TOLERANCE, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        positions = [point["position"] for point in own]
        axes.set_xticks(positions, [f"×{digits(position)}" for position in positions])
        axes.set_title(curve, fontsize=9, loc="left")
    _mark_uniform(grid[: len(curves)], content)


def _mark_uniform(panels: Any, content: Mapping[str, Any]) -> None:
    """Draw the loss of uniform as a dashed line, unless it would flatten the valleys."""
    gain = content["baseline"]["gain"]["mean"]
    highest = max((p["cost"]["mean"] or 0.0 for p in content["points"]), default=0.0)
    if gain is None or content["baseline"]["arm"] == content["centre"] or not 0 < gain < 3 * highest:
        return
    for i, axes in enumerate(panels):
        axes.axhline(gain, color="#222222", linewidth=1.0, linestyle=(0, (5, 2)))
        if i == 0:
            axes.annotate(
                "uniform",
                (0.02, gain),
                xycoords=axes.get_yaxis_transform(),
                xytext=(0, 2),
                textcoords="offset points",
                fontsize=8,
            )


def _draw_ablation(figure: Any, content: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    for i, curve in enumerate(_curves(content) or [""]):
        own = _points(content, curve)
        _draw_line(axes, own, {**drawing.series_style(i), "label": curve})
        for point in own:  # the block that each point switches on
            if "+" in point["arm"] and point["cost"]["mean"] is not None:
                place = {"xytext": (0, 6 if i else -13), "textcoords": "offset points", "ha": "center"}
                added = point["arm"].rpartition("+")[2]
                axes.annotate(added, (point["position"], point["cost"]["mean"]), fontsize=8, **place)
    axes.set_xlabel("blocks switched on", fontsize=9)
    axes.set_xticks(sorted({point["position"] for point in content["points"]}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if _curves(content):
        axes.legend(fontsize=9)


def _points(content: Mapping[str, Any], curve: str) -> list[Mapping[str, Any]]:
    own = [point for point in content["points"] if point["curve"] in ("", curve)]
    return sorted(own, key=lambda point: float(point["position"]))


def _draw_line(axes: Any, points: list[Mapping[str, Any]], style: Mapping[str, Any]) -> None:
    """Draw the costs with their intervals, and a red line where a run diverged."""
    finite = [point for point in points if point["cost"]["mean"] is not None]
    means = [point["cost"]["mean"] for point in finite]
    bars = [point["cost"]["ci95"] or [mean, mean] for point, mean in zip(finite, means)]
    below = [mean - low for mean, (low, _) in zip(means, bars)]
    above = [high - mean for mean, (_, high) in zip(means, bars)]
    axes.errorbar(
        [point["position"] for point in finite],
        means,
        yerr=[below, above],
        capsize=2,
        linewidth=1.6,
        marker="o",
        markersize=4,
        **style,
    )
    axes.axhline(0.0, color="#777777", linewidth=0.8)
    for point in points:
        if point["cost"]["mean"] is None:
            axes.axvline(point["position"], color="#bb3333", linewidth=0.8, linestyle="--")


def _draw_tuning(figure: Any, content: Mapping[str, Any]) -> None:
    warmups = list(dict.fromkeys(run["warmup_fraction"] for run in content["tuning"]))
    arms = list(dict.fromkeys(run["arm"] for run in content["tuning"]))[:_MOST_LINES]
    grid = figure.subplots(1, len(warmups), squeeze=False, sharey=True)[0]
    for axes, warmup in zip(grid, warmups):
        for i, arm in enumerate(arms):
            runs = [r for r in content["tuning"] if (r["arm"], r["warmup_fraction"]) == (arm, warmup)]
            points = sorted((r["base_lr"], r["tune_loss"]) for r in runs if r["tune_loss"] is not None)
            style = {"marker": "o", **drawing.series_style(i)}
            axes.plot([lr for lr, _ in points], [loss for _, loss in points], label=arm, **style)
            for run in runs:
                if run["chosen"] and run["tune_loss"] is not None:
                    axes.plot(
                        run["base_lr"], run["tune_loss"], "o", markersize=12, markerfacecolor="none",
                        markeredgecolor=style["color"], markeredgewidth=1.6,
                    )  # fmt: skip
        axes.set_xscale("log")
        lrs = sorted({r["base_lr"] for r in content["tuning"] if r["warmup_fraction"] == warmup})
        axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs], fontsize=8, rotation=30 if len(lrs) > 4 else 0)
        axes.minorticks_off()
        axes.set_xlabel("base learning rate")
        if warmup is not None:
            axes.set_title(f"warm-up {warmup:.0%}", fontsize=10)
    grid[0].set_ylabel("terminal tune loss (nats per token)")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9, ncols=3)
