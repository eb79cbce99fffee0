"""Draw loss_curves.png and tuning.png of data/llama-2m from curves.json and compare.json beside them.

    python studies/2026-11-ratio-rules/redraw_curves.py

The runs of this setting were not kept. curves.json holds their mean validation losses as read off the figures of the
single arms, so the figure has no line for each seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from blockwise_lr.compare.arms import Arm, Series
from blockwise_lr.compare.figures import _draw_tuning
from blockwise_lr.drawing import figure, save, series_style
from blockwise_lr.train.presets import Setting

DATA = Path(__file__).parent / "data" / "llama-2m"
BASELINES = {"uniform": "#222222", "uniform 2N": "#8a8a8a"}


def main() -> None:
    curves = json.loads((DATA / "curves.json").read_text(encoding="utf-8"))["curves"]
    arms = [name for name in curves if name not in BASELINES]
    with figure((9.0, 4.6)) as made:
        axes = made.add_subplot()
        for name, points in curves.items():
            style = {"color": BASELINES[name]} if name in BASELINES else series_style(arms.index(name))
            axes.plot(*zip(*points), label=name, linewidth=1.8, **style)
        axes.set(xlim=(0, 618), ylim=(3.85, 5.74), xlabel="optimizer step")
        axes.set_ylabel("validation loss (nats a token)")
        axes.legend(loc="upper right", fontsize=9)
        save(made, DATA / "loss_curves.png")
    draw_tuning(DATA)


def draw_tuning(results: Path) -> None:
    """Draw tuning.png of a setting from the runs of the grid in its compare.json."""
    content = json.loads((results / "compare.json").read_text(encoding="utf-8"))
    arms: dict[str, Arm] = {}
    series: dict[str, Series] = {}
    for name, found in content["arms"].items():
        own = name if found["horizon"] == "N" else name.removesuffix(f" {found['horizon']}")
        arm = arms.setdefault(own, Arm(own, found["optimizer"], found["ratios"]))
        series[name] = Series(name, arm, found["horizon"], found["steps"])
    tuning: list[tuple[Any, Any]] = []
    for run in content["tuning"]:
        setting = Setting(run["base_lr"], run["warmup_fraction"])
        tried = SimpleNamespace(setting=setting, series=series[run["arm"]], base_lr=run["base_lr"])
        lost = run["tune_loss"] is None
        tuning.append((tried, SimpleNamespace(tune_loss=run["tune_loss"], diverged=lost)))
    shown: Any = SimpleNamespace(
        plan=SimpleNamespace(
            series=list(series.values()),
            arms=tuple(arms.values()),
            warmups=content["warmups"],
            base_lrs=content["base_lrs"],
        ),
        tuning=tuning,
        chosen={name: Setting(a["base_lr"], a["warmup_fraction"]) for name, a in content["arms"].items()},
    )
    with figure((9.0, 4.6)) as made:
        _draw_tuning(made, shown)
        save(made, results / "tuning.png")


if __name__ == "__main__":
    main()
