"""The figures of a search: loss against every ratio, the course of the search, and the gain over uniform."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr import drawing
from blockwise_lr.compare.figures import ReportFigure
from blockwise_lr.tune.valley import ALLOWED, REACH, Valley

_COLUMNS = 4
_UNIFORM, _RATIOS, _BEST = "#8a8a8a", "#0072B2", "#D55E00"
_TITLES = {"base_lr": "base learning rate", "warmup": "warm-up"}


def draw_figures(content: Mapping[str, Any], out: Path) -> dict[str, list[ReportFigure]]:
    """Draw every figure and write it as a PNG file into `out`.

    Args:
        content: the content of tune.json.
        out: the folder to write to.

    Returns:
        {"ratios": [...], "search": [...], "gain": [...]}, with one figure each.
    """
    rows = -(-len(content["valleys"]) // _COLUMNS)
    sizes: dict[str, tuple[tuple[float, float], Callable[[Any, Mapping[str, Any]], None]]] = {
        "ratios": ((11.0, 2.7 * rows + 0.5), _draw_ratios),
        "search": ((9.0, 3.8), _draw_search),
        "gain": ((9.0, 3.8), _draw_gain),
    }
    return {
        name: [ReportFigure.draw(out, name, size, function, content)]
        for name, (size, function) in sizes.items()
    }


def _searched(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [t for t in content["trials"] if t["phase"] != "repeat" and t["order"] is not None]


def _value(trial: Mapping[str, Any], name: str) -> float:
    point = trial["point"]
    return float(point[name] if name in _TITLES else point["ratios"].get(name, 1.0))


def _limits(losses: list[float]) -> tuple[float, float]:
    """Return the limits of the loss axis: a few far trials must not flatten the valley."""
    low, high = min(losses), float(np.quantile(losses, 0.8))
    high = max(high, low + 4 * ALLOWED)
    pad = 0.08 * (high - low)
    return low - 1.5 * pad, high + pad


def _draw_ratios(figure: Any, content: Mapping[str, Any]) -> None:
    """Draw one panel for each dimension: the loss of all trials, the fitted parabola and its valley."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = list(content["valleys"])
    rows = -(-len(names) // _COLUMNS)
    grid = figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False)
    trials = _searched(content)
    low, high = _limits([trial["tune_loss"] for trial in trials if trial["tune_loss"] is not None])
    for axes, name in zip(grid.flat, names):
        axes.set_ylim(low, high)
        _draw_panel(axes, content, name, trials)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("tune loss (nats per token)", fontsize=9)
    handles = [
        Line2D([], [], marker="s", linestyle="", color=_UNIFORM, markersize=5, label="uniform trial"),
        Line2D([], [], marker="o", linestyle="", color=_RATIOS, markersize=5, label="trial with ratios"),
        Line2D([], [], marker="*", linestyle="", color=_BEST, markersize=11, label="best trial"),
        Line2D([], [], marker="x", linestyle="", color="#555555", label="ended, diverged or above the frame"),
        Line2D([], [], color=_BEST, label="fit, all others at the best trial"),
        Patch(color=_BEST, alpha=0.15, label=f"costs at most {ALLOWED:g} nats"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)


def _draw_panel(axes: Any, content: Mapping[str, Any], name: str, trials: list[Mapping[str, Any]]) -> None:
    high = axes.get_ylim()[1]
    values = np.array([_value(trial, name) for trial in trials])
    for trial, value in zip(trials, values):
        loss, colour = trial["tune_loss"], _UNIFORM if trial["phase"] == "uniform" else _RATIOS
        if loss is None or loss > high:
            axes.plot([value], [1.0], "x", color=colour, markersize=5, clip_on=False,
                      transform=axes.get_xaxis_transform(), zorder=4)  # fmt: skip
        else:
            marker = "s" if trial["phase"] == "uniform" else "o"
            axes.plot([value], [loss], marker, color=colour, markersize=4, alpha=0.7, zorder=3)
    best, entry = content["best"], content["valleys"][name]
    axes.plot([entry["value"]], [best["tune_loss"]], "*", color=_BEST, markersize=13, zorder=5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(values.min() / 2**0.5, values.max() * 2**0.5)
    left, right = axes.get_xlim()
    if entry["bounded"]:
        axes.axvspan(max(entry["low"], left), min(entry["high"], right), color=_BEST, alpha=0.15, linewidth=0)
    else:
        axes.text(0.03, 0.03, "range not known", transform=axes.transAxes, fontsize=8, color="#555555")
    if content["near_trials"] >= content["needed_trials"]:
        _draw_fit(axes, entry, best["tune_loss"])
    _ticks(axes, name)
    title = _TITLES.get(name, f"{name.upper()} ratio")
    axes.set_title(title, fontsize=10, loc="left", color=drawing.BLOCK_COLOURS.get(name, "#333333"), pad=9)


def _draw_fit(axes: Any, entry: Mapping[str, Any], lowest: float) -> None:
    """Draw the parabola and two standard errors to either side, where they are smaller than the frame."""
    low, high = axes.get_ylim()
    left, right = (math.log2(limit / entry["value"]) for limit in axes.get_xlim())
    valley = Valley("", entry["slope"], entry["curvature"], entry["covariance"])
    moves = np.linspace(left, right, 81)
    costs, errors = np.array([valley.cost(float(move)) for move in moves]).T
    known = (2 * errors < 0.5 * (high - low)) & (np.abs(moves) <= REACH)
    x, y = entry["value"] * 2.0**moves, lowest + costs
    dashes = "-" if entry["bounded"] else (0, (3, 2))
    axes.plot(x, np.where(known, y, np.nan), color=_BEST, linewidth=1.4, linestyle=dashes)
    axes.fill_between(x, y - 2 * errors, y + 2 * errors, where=known, color="#999999", alpha=0.2, linewidth=0)


def _ticks(axes: Any, name: str) -> None:
    """Label at most five values a power of two apart, in plain numbers: 1, 2, 4 ... for ratios, else 1, 2, 4 ... %."""
    unit = 1.0 if name not in _TITLES else 1e-2 if name == "warmup" else 1e-3
    left, right = (math.log2(limit / unit) for limit in axes.get_xlim())
    step = max(1, math.ceil((right - left) / 5))
    ticks = [2.0**e for e in range(math.ceil(left), math.floor(right) + 1, step)]
    labels = [
        f"{tick:.2g}" if unit == 1 else f"{tick:.3g}%" if name == "warmup" else f"{tick * unit:.2g}"
        for tick in ticks
    ]
    axes.set_xticks([tick * unit for tick in ticks], labels, fontsize=8)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=8)


def _draw_search(figure: Any, content: Mapping[str, Any]) -> None:
    """Draw the tune loss of every trial in the order of starts, and the best so far."""
    axes = figure.subplots()
    trials = _searched(content)
    finished = [trial for trial in trials if trial["tune_loss"] is not None]
    uniform = content["uniform"]["tune_loss"]
    low, high = _limits([trial["tune_loss"] for trial in finished])
    high = max(high, uniform + 0.15 * (uniform - low))
    axes.set_ylim(low, high)
    for phase, colour, marker, label in (
        ("uniform", _UNIFORM, "s", "uniform"),
        ("ratios", _RATIOS, "o", "with ratios"),
    ):
        own = [trial for trial in trials if trial["phase"] == phase]
        shown = [t for t in own if t["tune_loss"] is not None and t["tune_loss"] <= high]
        axes.plot([t["number"] for t in shown], [t["tune_loss"] for t in shown], marker, color=colour,
                  markersize=5, label=label)  # fmt: skip
        above = [t["number"] for t in own if t not in shown]
        axes.plot(above, [1.0] * len(above), "x", color=colour, clip_on=False, zorder=4,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    ordered = sorted(finished, key=lambda trial: trial["number"])
    best = np.minimum.accumulate([trial["tune_loss"] for trial in ordered])
    axes.step([t["number"] for t in ordered], best, where="post", color=_BEST, label="best so far")
    axes.axhline(uniform, color=_UNIFORM, linestyle=(0, (4, 3)), label="best uniform")
    for start in content["start"]:
        if start["tune_loss"] is not None and start["tune_loss"] <= high:
            axes.annotate(start["name"], (start["trial"], start["tune_loss"]), (6, 5), fontsize=8,
                          textcoords="offset points", color="#333333")  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("trial")
    axes.set_ylabel("tune loss (nats per token)")
    axes.legend(loc="upper right", fontsize=9)


def _draw_gain(figure: Any, content: Mapping[str, Any]) -> None:
    """Draw the training loss of the best and of the best uniform run, and the val loss of every seed."""
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1.0))
    by_number = {trial["number"]: trial for trial in content["trials"]}
    shown = (("uniform", "tuned uniform", _UNIFORM), ("best", "best ratios", _BEST))
    ends: list[float] = []
    for key, label, colour in shown:
        steps, losses = zip(*by_number[content[key]["trial"]]["curve"])
        left.plot(steps, losses, color=colour, label=label, linewidth=1.6)
        ends += losses[len(losses) // 4 :]
    left.set_ylim(min(ends) - 0.05 * (max(ends) - min(ends)), max(ends))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    left.set_title(f"seed {content['seed']}", fontsize=10, loc="left")
    left.legend(loc="upper right", fontsize=9)
    for i in range(len(content["seeds"])):
        pair = [content[key]["runs"][i]["val_loss"] for key, _, _ in shown]
        if None not in pair:
            right.plot([0, 1], pair, color="#bbbbbb", linewidth=1, zorder=1)
        for x, (value, (_, _, colour)) in enumerate(zip(pair, shown)):
            if value is not None:
                right.plot([x], [value], "o", color=colour, markersize=6)
    right.set_xlim(-0.4, 1.6)
    right.set_xticks([0, 1], [label for _, label, _ in shown])
    right.set_ylabel("val loss (nats per token)")
    right.set_title("after the last step, by seed", fontsize=10, loc="left")
    _label_seeds(right, [(run["val_loss"], run["seed"]) for run in content["best"]["runs"]])


def _label_seeds(axes: Any, runs: list[tuple[float | None, int]]) -> None:
    """Write the seed next to each point of the best ratios, with labels of close points moved apart."""
    low, high = axes.get_ylim()
    height = -math.inf
    for loss, seed in sorted((loss, seed) for loss, seed in runs if loss is not None):
        height = max(loss, height + 0.05 * (high - low))
        axes.text(1.08, height, f"seed {seed}", fontsize=8, va="center")
