"""The figures of a fit over sizes, drawn from scaling.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from blockwise_lr import drawing
from blockwise_lr.compare.over_seeds import loss_gap
from blockwise_lr.compare.scaling_wording import format_count, size_key

_BASELINE = "#222222"


def draw_laws(figure: Any, content: Mapping[str, Any]) -> None:
    """Draw the loss of every arm against the size, both logarithmic: points with intervals, laws with bands."""
    axes = figure.subplots()
    sizes = [size[size_key(content)] for size in content["sizes"]]
    grid = content["curves"]["parameters"]
    seen = []
    for i, arm in enumerate(content["arms"]):
        style = {"color": _BASELINE, "linestyle": "-"} if i == 0 else drawing.series_style(i - 1)
        curve = content["curves"]["arms"][arm]
        axes.plot(grid, curve["loss"], linewidth=1.6, label=arm, **style)
        axes.fill_between(grid, *curve["ci95"], color=style["color"], alpha=0.12, linewidth=0)
        means = [size["arms"][arm]["mean"] for size in content["sizes"]]
        bars = [_half_interval(size["arms"][arm]["losses"]) for size in content["sizes"]]
        axes.errorbar(
            sizes, means, yerr=bars, fmt="o", color=style["color"], markersize=5, capsize=2.5, linewidth=1.2
        )
        seen += [value + side * bar for value, bar in zip(means, bars) for side in (-1, 1)]
        seen += curve["loss"]
    pad = (max(seen) / min(seen)) ** 0.06
    axes.set_ylim(min(seen) / pad, max(seen) * pad)  # a wide band must not flatten the curves
    _label_sizes(axes, content)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0) if (high - low) / s <= 9)
    ticks = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks.round(6)])
    axes.set_yticks([], minor=True)
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(fontsize=9)


def draw_gaps(figure: Any, content: Mapping[str, Any]) -> None:
    """Draw the loss gap of every arm against the size, with intervals."""
    axes = figure.subplots()
    for i, comparison in enumerate(content["comparisons"]):
        sizes = [size["parameters"] for size in comparison["sizes"]]
        means = [size["loss_gap"]["mean"] for size in comparison["sizes"]]
        bars = [
            (size["loss_gap"]["ci95"][1] - size["loss_gap"]["ci95"][0]) / 2
            if size["loss_gap"]["ci95"]
            else 0.0
            for size in comparison["sizes"]
        ]
        axes.errorbar(
            sizes,
            means,
            yerr=bars,
            marker="o",
            capsize=2.5,
            label=comparison["arm"],
            **drawing.series_style(i),
        )
    axes.axhline(0.0, color="#777777", linewidth=0.8)
    _label_sizes(axes, content)
    axes.set_ylabel("loss gap (nats per token)")
    axes.legend(fontsize=9)


def draw_factors(figure: Any, content: Mapping[str, Any]) -> None:
    """Draw the factor of parameters of every arm against the size; open circles are read outside the range."""
    axes = figure.subplots()
    highest = 1.0
    for i, comparison in enumerate(content["comparisons"]):
        style = drawing.series_style(i)
        known = [size for size in comparison["sizes"] if size["factor"]["value"] is not None]
        axes.plot(
            [size["parameters"] for size in known],
            [size["factor"]["value"] for size in known],
            label=comparison["arm"],
            **style,
        )
        for size in known:
            value, (low, high) = size["factor"]["value"], size["factor"]["ci95"]
            ends = [value if low is None else low, 1e9 if high is None else high]
            axes.plot([size["parameters"]] * 2, ends, color=style["color"], linewidth=1.0)
            axes.plot(
                size["parameters"], value, "o", color=style["color"],
                markerfacecolor="white" if size["factor"]["outside"] else style["color"],
            )  # fmt: skip
            highest = max(highest, value, *([] if size["factor"]["outside"] or high is None else [high]))
    axes.axhline(1.0, color="#777777", linewidth=0.8)
    axes.set_yscale("log", base=2)
    lowest = min(
        (size["factor"]["ci95"][0] or 1.0 for each in content["comparisons"] for size in each["sizes"]),
        default=1.0,
    )
    axes.set_ylim(max(min(lowest, 1.0), 1 / 16) / 1.15, min(highest, 256.0) * 1.4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    _label_sizes(axes, content)
    axes.set_ylabel(f"parameters that {content['baseline'][:24]} needs")
    axes.legend(fontsize=9)


def _label_sizes(axes: Any, content: Mapping[str, Any]) -> None:
    sizes = [size[size_key(content)] for size in content["sizes"]]
    axes.set_xscale("log")
    axes.set_xticks(sizes, [format_count(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("parameters" if content["parameters"] == "all" else "parameters outside embeddings")


def _half_interval(losses: Mapping[str, float]) -> float:
    """Return half of the 95 % interval of a mean loss over seeds; 0 for one seed."""
    values = list(losses.values())
    ci95 = loss_gap(values, [0.0] * len(values)).ci95
    return 0.0 if ci95 is None else float(np.ptp(ci95)) / 2
