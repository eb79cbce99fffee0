"""Draw the figures and print the tables of README.md from the runs in data/.

python studies/2026-11-paper-scale/draw.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr import DirectionalReport, drawing
from blockwise_lr.directional.directional_figure import plot_directional

HERE = Path(__file__).parent
NAMES = {"uniform": "uniform AdamW", "measured": "blockwise AdamW"}
BLOCKS = ("emb", "qk", "ffn", "vo", "norm", "head")


def load(name: str) -> dict[str, Any]:
    """Return the runs and settings in ``data/NAME.json``."""
    data: dict[str, Any] = json.loads((HERE / "data" / f"{name}.json").read_text(encoding="utf-8"))
    return data


def runs_table(name: str) -> str:
    """Return a Markdown table with one row for each run in ``data/NAME.json``."""
    lines = [
        "| ratios | steps | base LR | warm-up | tune loss | val loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    runs = sorted(load(name)["runs"], key=lambda run: (run["steps"], run["arm"], run["tune"]))
    lines += [
        f"| {run['arm']} | {run['steps']} | {run['base_lr']:.2g} | {run['warmup']:.0%} "
        f"| {run['tune']:.3f} | {run['val']:.3f} |"
        for run in runs
    ]
    return "\n".join(lines)


def sharpness_table() -> str:
    """Return a Markdown table of the sharpness of every block along the uniform run at 6e-4."""
    lines = [
        "| step | " + " | ".join(block.upper() for block in BLOCKS) + " |",
        "| --- " * (len(BLOCKS) + 1) + "|",
    ]
    lines += [
        f"| {row['step']} | " + " | ".join(f"{row[block][0]:.1e}" for block in BLOCKS) + " |"
        for row in load("240-steps")["sharpness"]
    ]
    return "\n".join(lines)


def best(runs: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """Return the run of an arm with the lowest tune loss."""
    return min((run for run in runs if run["arm"] == arm), key=lambda run: run["tune"])


def draw(path: Path) -> None:
    """Draw the validation loss of the best uniform run and of the blockwise run over 1 000 steps."""
    runs = load("1000-steps")["runs"]
    with drawing.figure((6.4, 4.2)) as made:
        axes = made.add_subplot()
        for arm, colour, above in (("uniform", "#D55E00", True), ("measured", "#0072B2", False)):
            run = best(runs, arm)
            points = [*run["curve"], [run["steps"], run["val_8"]]]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=3)
            place = (330, 4.55) if above else (130, 2.98)
            axes.annotate(NAMES[arm], place, color=colour, fontsize=15, fontweight="bold")
            axes.annotate(
                f"{run['val']:.2f}",
                (1000, run["val_8"]),
                xytext=(8, 6 if above else -14),
                textcoords="offset points",
                color=colour,
                fontsize=16,
                fontweight="bold",
                annotation_clip=False,
            )
        axes.set(xlim=(100, 1000), ylim=(2.6, 5.2), xlabel="step (32 768 tokens each)")
        axes.set_ylabel("validation loss")
        axes.set_title("LLaMA-134M, technical English, one seed", fontsize=15)
        axes.tick_params(labelsize=14)
        axes.xaxis.label.set_size(15)
        axes.yaxis.label.set_size(15)
        drawing.save(made, path)


def draw_brackets(path: Path) -> None:
    """Draw the tune loss over the base learning rate of the runs of 240 steps, a line for each set of ratios."""
    runs = [run for run in load("240-steps")["runs"] if run["steps"] == 240]
    arms = ["uniform", "paper", "own", "measured"]
    with drawing.figure((6.4, 4.4)) as made:
        axes = made.add_subplot()
        for number, arm in enumerate(arms):
            style = drawing.series_style(number) | {"linestyle": "-"}
            own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["base_lr"])
            usual = [(run["base_lr"], run["tune"]) for run in own if run["warmup"] == 0.15]
            axes.plot(*zip(*usual, strict=True), marker="o", label=arm, linewidth=2, **style)
            for run in own:
                if run["warmup"] != 0.15:
                    point = (run["base_lr"], run["tune"])
                    axes.plot(*point, marker="o", markerfacecolor="white", markersize=8, **style)
                    axes.annotate(
                        f"{run['warmup']:.0%}", point, xytext=(9, -4), textcoords="offset points", fontsize=12
                    )
        axes.plot([], [], "o", color="#555555", markerfacecolor="white", label="another warm-up")
        axes.set(xlabel="base learning rate", ylabel="tune loss after 240 steps")
        drawing.log_ticks(axes.xaxis)
        axes.set_xlim(1.2e-4, 3.2e-3)
        axes.set_ylim(4.35, 6.25)
        axes.legend(fontsize=12, ncols=2)
        large(axes)
        drawing.save(made, path)


def draw_sharpness(path: Path) -> None:
    """Draw the sharpness of every block along the uniform run at 6e-4. Step 0 is drawn at 1."""
    rows = load("240-steps")["sharpness"]
    steps = [max(row["step"], 1) for row in rows]
    with drawing.figure((6.4, 4.4)) as made:
        axes = made.add_subplot()
        for block in BLOCKS:
            means = [row[block][0] for row in rows]
            axes.plot(steps, means, marker="o", markersize=4, color=drawing.block_colour(block), linewidth=2)
            place = {"xytext": (6, -4), "textcoords": "offset points", "annotation_clip": False}
            # The curves end close together.
            place["xytext"] = (6, {"norm": 2, "vo": -5, "qk": -7, "emb": -8}.get(block, -2))
            axes.annotate(
                block.upper(), (240, means[-1]), color=drawing.block_colour(block), fontsize=13, **place
            )
        axes.set(xlabel="step (the start is drawn at 1)", ylabel="average sharpness S(b)")
        drawing.log_ticks(axes.yaxis)
        drawing.log_ticks(axes.xaxis)
        axes.set_xlim(0.9, 240)
        large(axes)
        drawing.save(made, path)


def reports() -> list[DirectionalReport]:
    """Return the nine directional reports along the uniform run at 6e-4."""
    return [DirectionalReport.from_dict(report) for report in load("240-steps")["directional"]]


def conditions(found: list[DirectionalReport]) -> list[float]:
    """Return the condition number of each report's matrix C, in units in which every block has curvature 1."""
    scaled = []
    for report in found:
        matrix = np.array(report.matrix)
        scale = np.sqrt(np.diagonal(matrix))
        scaled.append(float(np.linalg.cond(matrix / np.outer(scale, scale))))
    return scaled


def large(axes: Any) -> None:
    """Make the letters readable on a telephone."""
    axes.tick_params(labelsize=13)
    axes.xaxis.label.set_size(14)
    axes.yaxis.label.set_size(14)


if __name__ == "__main__":
    draw(HERE / "loss_curves.png")
    draw_brackets(HERE / "tuning-brackets.png")
    draw_sharpness(HERE / "sharpness-along-the-run.png")
    plot_directional(reports(), HERE / "directional-rates-along-the-run.png")
    for table in (runs_table("1000-steps"), runs_table("240-steps"), sharpness_table()):
        print(table, end="\n\n")
