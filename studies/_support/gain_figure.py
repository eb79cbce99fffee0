"""A figure of what rules win over a baseline, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from blockwise_lr import drawing
from blockwise_lr.compare.over_seeds import LossGap


def draw_gains(gaps: Mapping[str, Mapping[str, LossGap]], path: Path, *, over: str) -> bool:
    """Draw the nats won, one row a rule and one mark a series; return whether there is anything to draw.

    Args:
        gaps: by series, such as "300 steps", and by rule.
        path: the file.
        over: what the rules are compared with.
    """
    rules = list(dict.fromkeys(rule for found in gaps.values() for rule in found))
    if not rules:
        return False
    with drawing.figure((6.4, 1.2 + 0.6 * len(rules))) as made:
        axes = made.subplots()
        for number, (series, found) in enumerate((name, each) for name, each in gaps.items() if each):
            axes.errorbar(
                [math.nan if gap.mean is None else gap.mean for gap in found.values()],
                [rules.index(rule) + 0.15 * number for rule in found],
                xerr=[0.0 if gap.ci95 is None else (gap.ci95[1] - gap.ci95[0]) / 2 for gap in found.values()],
                marker="o",
                capsize=3,
                label=series,
                **drawing.series_style(number) | {"linestyle": "none"},
            )
        axes.axvline(0, color="#777777", linewidth=1)
        axes.set_yticks(range(len(rules)), rules)
        axes.invert_yaxis()
        axes.set_xlabel(f"nats won over {over}")
        axes.legend()
        drawing.save(made, path)
    return True
