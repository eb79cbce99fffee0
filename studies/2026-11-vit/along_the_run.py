"""The tables and the figure of what was measured along the watched runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arms import SHAPES
from comparison_tables import table
from plan import MODELS, watched
from tuning import Results

from blockwise_lr import DirectionalReport, drawing
from blockwise_lr.blocks import Block

BLOCKS = ("emb", "pos", "conv", "qk", "ffn", "vo", "norm", "head")
PAIRS = (("qk", "ffn"), ("ffn", "vo"), ("vo", "norm"), ("emb", "qk"), ("conv", "qk"), ("pos", "qk"))
"""The paper's order, each pair flatter block first. EMB is followed by the blocks that take its place in a ViT."""


def measured_runs(results: Results, shape: str = "vit") -> dict[str, Mapping[str, Any]]:
    """Return the watched runs of a model that have ended, by name."""
    arms = watched(shape, results)
    return {name: results.runs[arm.name] for name, arm in arms.items() if arm.name in results.runs}


def sharpness_table(results: Results, name: str, estimator: str, shape: str = "vit") -> str:
    """Average sharpness by block along one watched run, with standard errors."""
    run = measured_runs(results, shape).get(name)
    rows = []
    for each in run["measurements"] if run else ():
        cells = []
        for block in BLOCKS:
            mean, error = each[estimator][block]
            cells.append("-" if mean is None else f"{mean:.2g}" + (f" ± {error:.1g}" if error else ""))
        rows.append([f"{each['step']}", *cells])
    return table(["step", *(block.upper() for block in BLOCKS)], rows)


def order_counts(
    results: Results, estimator: str = "fisher", shape: str = "vit"
) -> dict[str, dict[tuple[str, str], tuple[int, int]]]:
    """Return how often the first block of a pair is flatter, and at how many points after step 0, by watched run."""
    found = {}
    for name, run in measured_runs(results, shape).items():
        points = [each[estimator] for each in run["measurements"] if each["step"]]
        found[name] = {
            (a, b): (sum((p[a][0] or 0) < (p[b][0] or 0) for p in points), len(points)) for a, b in PAIRS
        }
    return found


def order_table(results: Results) -> str:
    """One row a model, watched run and estimator, one column a pair of the paper's order."""
    rows = []
    for shape in MODELS:
        for estimator in ("fisher", "hutchinson"):
            for name, counts in order_counts(results, estimator, shape).items():
                cells = [f"{counts[pair][0]} of {counts[pair][1]}" for pair in PAIRS]
                rows.append([SHAPES[shape].library, name, estimator, *cells])
    return table(["model of", "run", "estimator", *(f"{a.upper()} < {b.upper()}" for a, b in PAIRS)], rows)


def directional_table(results: Results, name: str) -> str:
    """The best learning rate of each block over its current one along one watched run, the others moving as they do."""
    run = measured_runs(results).get(name)
    rows = []
    for each in run["measurements"] if run else ():
        if "directional" in each:
            report = DirectionalReport.from_dict(each["directional"])
            cells = [f"{report[b].factor_beside:.2g}" if b in report else "-" for b in map(Block, BLOCKS)]
            rows.append([f"{each['step']}", *cells])
    return table(["step", *(block.upper() for block in BLOCKS)], rows)


def draw_sharpness(results: Results, path: Path) -> bool:
    """Draw the average sharpness of every block along the uniform and the `half` run; return whether there is any."""
    runs = {name: run for name, run in measured_runs(results).items() if name in ("uniform", "half")}
    if not runs:
        return False
    with drawing.figure((4.2 * max(2, len(runs)), 4.2)) as made:
        for axes, (name, run) in zip(
            made.subplots(1, len(runs), sharey=True, squeeze=False)[0], runs.items()
        ):
            for block in BLOCKS:
                points = [(each["step"], *each["fisher"][block]) for each in run["measurements"]]
                drawn = [(step, mean, error or 0.0) for step, mean, error in points if mean]
                steps, means, errors = zip(*drawn) if drawn else ((), (), ())
                axes.errorbar(
                    steps, means, yerr=errors, marker="o", markersize=4, capsize=2, linewidth=1.8,
                    color=drawing.block_colour(block), label=block.upper(),
                )  # fmt: skip
            axes.set_title(f"run with {name} rates")
            axes.set_xlabel("step")
            drawing.log_ticks(axes.yaxis)
        made.axes[0].set_ylabel("average sharpness S(b)")
        made.axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawing.save(made, path)
    return True
