"""The paper's figures of sharpness: bars, evolution over training, density of the elements, layer by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blockwise_lr.blocks import Block
from blockwise_lr.drawing import block_colour, figure, log_ticks, save
from blockwise_lr.sharpness.histogram import Histogram
from blockwise_lr.sharpness.parameter_parts import OUTSIDE
from blockwise_lr.sharpness.principle import PAPER_ORDER, in_paper_order

if TYPE_CHECKING:
    from blockwise_lr.sharpness.report import SharpnessReport

_LABEL = "average sharpness S(b)"
_GREY = "#555555"
_NOTHING = "no block's sharpness is above 0, so there is nothing to draw on a logarithmic scale"


def plot_blocks(report: SharpnessReport, path: str | Path) -> Path:
    """Plot the sharpness of each block as bars on a logarithmic scale, with standard errors.

    Args:
        report: a measurement.
        path: the figure's file, ending in .png, .svg or .pdf.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: the path has another ending, or no value is above 0, so a logarithmic scale can show none.
    """
    width = max(4.2, 1.6 + 0.85 * len(report))
    return _plot(lambda axes: draw_blocks(axes, report), (width, 4.2), _title(report), path)


def draw_blocks(axes: Any, report: SharpnessReport) -> None:
    """Draw :func:`plot_blocks` on `axes`: the paper's blocks in its order, then the others."""
    blocks = in_paper_order(report)
    drawn = [b for b in blocks if report[b].mean > 0]
    if not drawn:
        raise ValueError(_NOTHING)
    at = [blocks.index(b) for b in drawn]
    means = [report[b].mean for b in drawn]
    errors = [0.0 if math.isnan(report[b].stderr) else report[b].stderr for b in drawn]
    axes.bar(at, means, color=[block_colour(b) for b in drawn], width=0.7)
    lower = [min(e, 0.9 * m) for e, m in zip(errors, means)]  # a bar cannot reach 0 on this scale
    _outline(axes.errorbar(at, means, yerr=[lower, errors], fmt="none", ecolor="#333333", capsize=3))
    top = [m + e for m, e in zip(means, errors)]
    axes.set_ylim(min(means) / 3, max(top) * 3)
    log_ticks(axes.yaxis)
    for x, mean, end in zip(at, means, top):
        axes.annotate(f"{mean:.1e}", (x, end), (0, 4), textcoords="offset points", ha="center", fontsize=8)
    for x, block in enumerate(blocks):
        if block not in drawn:  # estimates of the Hessian's trace can be negative
            axes.annotate(f"{report[block].mean:.1e}", (x, 0), (0, 4), xycoords=("data", "axes fraction"),
                          textcoords="offset points", ha="center", fontsize=8, color=_GREY)  # fmt: skip
    axes.set_xticks(range(len(blocks)), [b.name for b in blocks])
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_ylabel(_LABEL)
    axes.grid(axis="x", visible=False)
    if len(drawn) < len(blocks):
        axes.set_xlabel("no bar: not above 0", fontsize=9)


def plot_evolution(reports: Sequence[SharpnessReport], path: str | Path) -> Path:
    """Plot the sharpness of every block over the training steps (the paper's figure of the principle).

    Args:
        reports: measurements of one training. Reports without a step are ignored.
        path: as in :func:`plot_blocks`.

    Returns:
        The path.

    Raises:
        ValueError: fewer than two steps, or two measurements of one step; and the errors of :func:`plot_blocks`.
    """
    last = max(reports, key=lambda r: -1 if r.step is None else r.step, default=None)
    title = "" if last is None else _title(last, step=False)

    def draw(axes: Any) -> None:
        draw_evolution(axes, reports)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return _plot(draw, (7.2, 4.4), title, path)


def draw_evolution(axes: Any, reports: Sequence[SharpnessReport]) -> None:
    """Draw one line for each block on `axes`, with a band of one standard error. The step axis includes step 0."""
    ordered = sorted((r for r in reports if r.step is not None), key=lambda r: r.step or 0)
    steps = [r.step or 0 for r in ordered]
    if len(set(steps)) < 2:
        raise ValueError(f"an evolution needs measurements at two steps or more; there are {len(set(steps))}")
    if twice := sorted({s for s in steps if steps.count(s) > 1}):
        raise ValueError(
            f"an evolution is of one training; there are several measurements of step {twice[0]}"
        )
    if not any(estimate.mean > 0 for report in ordered for estimate in report.values()):
        raise ValueError(_NOTHING)
    for block in _sharpest_first({b for r in ordered for b in r}):
        # NaN makes a gap in the line, where a value cannot be drawn.
        found = [r[block] if block in r and r[block].mean > 0 else None for r in ordered]
        means = np.array([math.nan if e is None else e.mean for e in found])
        errors = np.nan_to_num([0.0 if e is None else e.stderr for e in found])
        colour = block_colour(block)
        axes.plot(steps, means, color=colour, label=block.name, marker="o", markersize=3)
        low, high = np.maximum(means - errors, means / 10), means + errors
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    largest = steps[-1]
    axes.set_xscale("symlog", linthresh=max(1, largest / 100), linscale=0.4)
    axes.set_xlim(left=min(0.0, steps[0]) - 0.15 * max(1, largest / 100))
    ticks = _apart(steps, axes.xaxis.get_transform())
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    log_ticks(axes.yaxis)
    axes.set_xlabel("training step")
    axes.set_ylabel(_LABEL)


def plot_density(report: SharpnessReport, path: str | Path) -> Path:
    """Plot the distribution of each block's elements over sharpness (the paper's density figure).

    Args:
        report: a report measured with ``histogram=True``.
        path: as in :func:`plot_blocks`.

    Returns:
        The path.

    Raises:
        ValueError: the report has no histograms; and the errors of :func:`plot_blocks`.
    """
    if not report.histograms:
        raise ValueError("the report holds no histograms: measure with histogram=True")
    shares = {b: h.zeros / (sum(h.counts) + h.zeros) for b, h in report.histograms.items()}
    never = [f"{b.name} {shares[b]:.0%}" for b in in_paper_order(shares) if shares[b] > 0.005]
    title = _title(report) + (f"; no gradient: {', '.join(never)}" if never else "")

    def draw(axes: Any) -> None:
        draw_density(axes, report)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return _plot(draw, (7.2, 4.2), title, path)


def draw_density(axes: Any, report: SharpnessReport) -> None:
    """Draw one step line for each block on `axes`. Its area is the share of elements with a gradient."""
    reached = {b: h for b, h in report.histograms.items() if h.counts}
    for block in _sharpest_first(reached):
        edges, density = _density(reached[block])
        axes.stairs(density, 10**edges, color=block_colour(block), label=block.name, linewidth=1.6)
    axes.set_xlim(*_visible(reached.values()))
    axes.set_ylim(bottom=0)
    log_ticks(axes.xaxis)
    axes.set_xlabel("sharpness of an element")
    axes.set_ylabel("share of the block's elements a decade")


def plot_layers(report: SharpnessReport, path: str | Path) -> Path:
    """Plot layer by block as a heat map. Parameters outside all layers are the last row.

    Args:
        report: a measurement.
        path: as in :func:`plot_blocks`.

    Returns:
        The path.
    """
    size = (max(4.6, 2.4 + 0.95 * len(report)), max(2.4, 1.6 + 0.34 * len(report.per_layer)))
    return _plot(lambda axes: draw_layers(axes, report), size, _title(report), path)


def draw_layers(axes: Any, report: SharpnessReport) -> None:
    """Draw :func:`plot_layers` on `axes`. Values that are not above 0 are written without a colour."""
    blocks, layers = in_paper_order(report), list(report.per_layer)
    means = np.full((len(layers), len(blocks)), np.nan)
    for i, layer in enumerate(layers):
        for block, estimate in report.per_layer[layer].items():
            means[i, blocks.index(block)] = estimate.mean
    if not (means > 0).any():
        raise ValueError(_NOTHING)
    values = np.log10(means, where=means > 0, out=np.full_like(means, np.nan))
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), mean in np.ndenumerate(means):
        if not np.isnan(mean):
            colour = _GREY if mean <= 0 else "black" if values[i, j] > middle else "white"
            axes.text(j, i, f"{mean:.1e}", ha="center", va="center", fontsize=7, color=colour)
    prefix, names = _short_names(layers)
    axes.set_xticks(range(len(blocks)), [b.name for b in blocks])
    axes.set_yticks(range(len(layers)), names, fontsize=8)
    axes.set_ylabel(prefix)
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label="log10 S(b)")


def _plot(draw: Callable[[Any], None], size: tuple[float, float], title: str, path: str | Path) -> Path:
    with figure(size) as made:
        axes = made.add_subplot()
        draw(axes)
        axes.set_title(title, fontsize=9, loc="left", color=_GREY)
        return save(made, path)


def _outline(bars: Any) -> None:
    """Draw a white outline around error bars, so that they are visible on bars of every colour."""
    from matplotlib.patheffects import withStroke

    for artist in (*bars.lines[1], *bars.lines[2]):
        artist.set_path_effects([withStroke(linewidth=2.6, foreground="white")])


def _sharpest_first(blocks: Any) -> list[Block]:
    """Return the blocks from top to bottom of a figure in which the principle holds."""
    ordered = in_paper_order(blocks)
    return [b for b in reversed(PAPER_ORDER) if b in ordered] + [b for b in ordered if b not in PAPER_ORDER]


def _apart(steps: Sequence[int], transform: Any) -> list[int]:
    """Return the steps whose labels do not overlap on an axis with `transform`, always with the first and the last."""
    at = dict(zip(steps, transform.transform(np.array(steps, dtype=float))))
    gap = 0.1 * (at[steps[-1]] - at[steps[0]])
    kept = [steps[0]]
    for step in steps[1:-1]:
        if at[step] - at[kept[-1]] >= gap and at[steps[-1]] - at[step] >= gap:
            kept.append(step)
    return [*kept, steps[-1]]


def _density(h: Histogram) -> tuple[Any, Any]:
    """Return bin edges (decimal logarithms) and density. Small blocks, which are noisy, get coarser bins."""
    total = sum(h.counts) + h.zeros
    merged = 1 if total >= 20_000 else 2
    counts = np.array([*h.counts, *[0] * (-len(h.counts) % merged)]).reshape(-1, merged).sum(1)
    edges = h.start + h.width * merged * np.arange(len(counts) + 1)
    return edges, counts / (total * h.width * merged)


def _visible(histograms: Any) -> tuple[float, float]:
    """Return the limits of the axis: they leave out the lowest per cent of each block's elements."""
    lows, highs = [], []
    for h in histograms:
        shares = np.cumsum(h.counts) / sum(h.counts)
        lows.append(h.start + h.width * int(np.argmax(shares > 0.01)))
        highs.append(h.start + h.width * len(h.counts))
    return (10 ** (min(lows) - 0.3), 10 ** (max(highs) + 0.1)) if lows else (1e-12, 1.0)


def _short_names(layers: Sequence[str]) -> tuple[str, list[str]]:
    """Return the common prefix of the layers' names, and the rest of each, shortened in the middle if long."""
    inside = [layer.split(".") for layer in layers if layer != OUTSIDE]
    shared = 0
    while inside and all(len(name) > shared + 1 and name[shared] == inside[0][shared] for name in inside):
        shared += 1
    names = [layer if layer == OUTSIDE else ".".join(layer.split(".")[shared:]) for layer in layers]
    prefix = ".".join(inside[0][:shared]) if inside else ""
    return _elided(prefix, 40), [_elided(name, 28) for name in names]


def _elided(name: str, length: int) -> str:
    half = length // 2
    return name if len(name) <= length else f"{name[: half - 1]}…{name[-half:]}"


def _title(report: SharpnessReport, *, step: bool = True) -> str:
    words = [report.estimator, f"{report.samples:,} samples"]
    if step and report.step is not None:
        words.insert(0, f"step {report.step:,}")
    return ", ".join(words)
