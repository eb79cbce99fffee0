"""The paper's figures of sharpness: bars, evolution over training, density of the elements, layer by block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr.blocks import Block
from blockwise_lr.drawing import block_colour, figure, save
from blockwise_lr.sharpness.report import SharpnessReport

PAPER_ORDER = (Block.EMB, Block.QK, Block.FFN, Block.VO, Block.NORM)
"""Flattest to sharpest, as the paper's principle has it."""

_LABEL = "average sharpness S(b)"


def in_paper_order(blocks: Iterable[Block]) -> list[Block]:
    """The paper's five as the principle orders them, then the others."""
    present = set(blocks)
    return [b for b in (*PAPER_ORDER, *(b for b in Block if b not in PAPER_ORDER)) if b in present]


def plot_blocks(report: SharpnessReport, path: str | Path) -> Path:
    """Bars of the blocks on a logarithmic scale, with their standard errors.

    Args:
        report: a measurement.
        path: of the figure; ends in .png, .svg or .pdf.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: another ending; or nothing to draw on a logarithmic scale, since no value is above 0.
    """
    blocks = [b for b in in_paper_order(report) if report[b].mean > 0]
    if not blocks:
        raise ValueError(
            "no block's sharpness is above 0, so there is nothing to draw on a logarithmic scale"
        )
    with figure((1.6 + 0.85 * len(blocks), 4.2)) as made:
        axes = made.add_subplot()
        means = [report[b].mean for b in blocks]
        errors = [0.0 if math.isnan(report[b].stderr) else report[b].stderr for b in blocks]
        names = [b.name for b in blocks]
        axes.bar(names, means, color=[block_colour(b) for b in blocks], width=0.7)
        lower = [min(e, 0.9 * m) for e, m in zip(errors, means)]  # a bar cannot reach 0 on this scale
        axes.errorbar(names, means, yerr=[lower, errors], fmt="none", ecolor="#555555", capsize=3)
        axes.set_yscale("log")
        axes.set_ylim(min(means) / 3, max(means) * 3)
        for name, mean in zip(names, means):
            axes.annotate(
                f"{mean:.1e}", (name, mean), (0, 7), textcoords="offset points", ha="center", fontsize=8
            )
        axes.set_ylabel(_LABEL)
        axes.grid(axis="x", visible=False)
        axes.set_title(_title(report), fontsize=9, loc="left", color="#555555")
        missing = [b.name for b in report if b not in blocks]
        if missing:
            axes.set_xlabel(f"not above 0, so not drawn: {', '.join(missing)}")
        return save(made, path)


def plot_evolution(reports: Sequence[SharpnessReport], path: str | Path) -> Path:
    """The sharpness of every block over the training steps (the paper's figure of the principle).

    Args:
        reports: measurements of one training, each with its step.
        path: as in :func:`plot_blocks`.

    Raises:
        ValueError: fewer than two steps; otherwise as :func:`plot_blocks`.
    """
    ordered = sorted((r for r in reports if r.step is not None), key=lambda r: r.step or 0)
    steps = {r.step for r in ordered}
    if len(steps) < 2:
        raise ValueError(f"an evolution needs measurements at two steps or more; there are {len(steps)}")
    with figure((7.2, 4.4)) as made:
        axes = made.add_subplot()
        draw_evolution(axes, ordered)
        axes.legend(*axes.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_title(_title(ordered[-1], step=False), fontsize=9, loc="left", color="#555555")
        return save(made, path)


def draw_evolution(axes: Any, reports: Sequence[SharpnessReport]) -> None:
    """One line a block, with a band of one standard error, on `axes`; the step axis shows step 0 too."""
    drawn = in_paper_order({b for r in reports for b in r})
    for block in reversed(drawn):
        found = [(r.step, r[block]) for r in reports if block in r and r[block].mean > 0]
        steps, estimates = [s for s, _ in found], [e for _, e in found]
        means = np.array([e.mean for e in estimates])
        errors = np.nan_to_num(np.array([e.stderr for e in estimates]))
        axes.plot(steps, means, color=block_colour(block), label=block.name, marker="o", markersize=3)
        axes.fill_between(
            steps, np.maximum(means - errors, means / 10), means + errors, color=block_colour(block), alpha=0.18,
            linewidth=0,
        )  # fmt: skip
    largest = max(r.step or 0 for r in reports)
    axes.set_yscale("log")
    axes.set_xscale("symlog", linthresh=max(1, largest / 100), linscale=0.4)
    axes.set_xlim(left=-0.2)
    ticks = sorted({r.step or 0 for r in reports})
    spread = [t for i, t in enumerate(ticks) if i in (0, len(ticks) - 1) or t >= 1.7 * max(ticks[i - 1], 1)]
    axes.set_xticks(spread, [f"{t:,}" for t in spread])
    axes.minorticks_off()
    axes.set_xlabel("training step")
    axes.set_ylabel(_LABEL)


def plot_density(report: SharpnessReport, path: str | Path) -> Path:
    """How the elements of each block are distributed over sharpness (the paper's density figure).

    Args:
        report: measured with ``histogram=True``.
        path: as in :func:`plot_blocks`.

    Raises:
        ValueError: the report holds no histograms; otherwise as :func:`plot_blocks`.
    """
    if not report.histograms:
        raise ValueError("the report holds no histograms: measure with histogram=True")
    with figure((7.2, 4.2)) as made:
        axes = made.add_subplot()
        without = {}
        for block in in_paper_order(report.histograms):
            h = report.histograms[block]
            total = sum(h.counts) + h.zeros
            without[block] = h.zeros / total
            if not h.counts:
                continue
            edges = h.start + h.width * np.arange(len(h.counts) + 1)
            density = np.array(h.counts) / (total * h.width)
            axes.stairs(density, 10**edges, color=block_colour(block), label=block.name, linewidth=1.6)
        axes.set_xscale("log")
        axes.set_xlim(left=_visible_from(report))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("sharpness of an element")
        axes.set_ylabel("share of the block's elements a decade")
        axes.legend(loc="upper left")
        title = _title(report)
        if never := [f"{b.name} {share:.0%}" for b, share in without.items() if share > 0.005]:
            title += f"; no gradient: {', '.join(never)}"
        axes.set_title(title, fontsize=9, loc="left", color="#555555")
        return save(made, path)


def plot_layers(report: SharpnessReport, path: str | Path) -> Path:
    """Layer by block as a heat map; what is outside of all layers comes last.

    Args:
        report: a measurement.
        path: as in :func:`plot_blocks`.
    """
    blocks = in_paper_order(report)
    layers = list(report.per_layer)
    values = np.full((len(layers), len(blocks)), np.nan)
    for i, layer in enumerate(layers):
        for block, estimate in report.per_layer[layer].items():
            if estimate.mean > 0:
                values[i, blocks.index(block)] = math.log10(estimate.mean)
    if np.isnan(values).all():
        raise ValueError("no sharpness is above 0, so there is nothing to draw on a logarithmic scale")
    with figure((2.4 + 0.95 * len(blocks), 1.6 + 0.34 * len(layers))) as made:
        axes = made.add_subplot()
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(blocks)), [b.name for b in blocks])
        axes.set_yticks(range(len(layers)), layers, fontsize=8)
        axes.grid(visible=False)
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "black" if value > middle else "white"
                axes.text(j, i, f"{10**value:.0e}", ha="center", va="center", fontsize=7, color=colour)
        made.colorbar(image, ax=axes, label=f"log10 of {_LABEL}")
        axes.set_title(_title(report), fontsize=9, loc="left", color="#555555")
        return save(made, path)


def _visible_from(report: SharpnessReport) -> float:
    """Where all but the lowest half per cent of the elements with a gradient lie."""
    lefts = []
    for h in report.histograms.values():
        if h.counts:
            shares = np.cumsum(h.counts) / sum(h.counts)
            lefts.append(h.start + h.width * int(np.argmax(shares > 0.005)))
    return float(10 ** (min(lefts) - 0.5)) if lefts else 1e-12


def _title(report: SharpnessReport, *, step: bool = True) -> str:
    words = [report.estimator, f"{report.samples:,} samples"]
    if step and report.step is not None:
        words.insert(0, f"step {report.step:,}")
    return ", ".join(words)
