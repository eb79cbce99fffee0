"""Draw loss_curves.png and print the tables of README.md from the runs in data/.

python studies/2026-11-paper-scale/draw.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockwise_lr import drawing

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


if __name__ == "__main__":
    draw(HERE / "loss_curves.png")
    for table in (runs_table("1000-steps"), runs_table("240-steps"), sharpness_table()):
        print(table, end="\n\n")
