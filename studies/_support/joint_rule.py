"""The earlier rule for ratios from the reports of a run, with which `own` was made in several studies.

It fails at 134M parameters (studies/2026-11-paper-scale). The library has another rule since
studies/2026-11-measurement-rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blockwise_lr.blocks import Block
from blockwise_lr.directional.directional_report import DirectionalReport, reports_of


def joint_ratios(
    reports: Sequence[DirectionalReport], low: float = 0.1, high: float = 20.0
) -> tuple[dict[Block, float], dict[Block, float]]:
    r"""Return the ratio of each block relative to the anchor, and the standard error of its logarithm.

        log r(b) = mean_t (l_t(b) - l_t(anchor)),   l_t(b) = log(r_t(b) * f_t(b)),   f_t = (C_t^-1 s_t) / lr_t

    r_t is the ratio at which the block was measured. f is bounded to [low, high], and is `low` where it is below 0.
    The anchor is FFN; a model without FFN is anchored at its largest block.

    Args:
        reports: measured during one run. Reports at learning rate 0 are left out.
        low, high: bounds of one measured change.
    """
    moving = [report for report in reports if all(slope.lr > 0 for slope in report.values())]
    sizes = {block: slope.numel for report in moving for block, slope in report.items()}
    anchor = Block.FFN if Block.FFN in sizes else max(sizes, key=sizes.__getitem__)
    relative: dict[Block, list[float]] = {block: [] for block in Block if block in sizes}
    for report in moving:
        if anchor not in report:
            continue
        together = report.joint_best_lr
        logs = {
            block: math.log(slope.ratio * min(max(together[block] / slope.lr, low), high))
            for block, slope in report.items()
        }
        for block, log in logs.items():
            relative[block].append(log - logs[anchor])
    ratios = {block: math.exp(float(np.mean(found))) for block, found in relative.items() if found}
    errors = {
        block: float(np.std(found, ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan
        for block, found in relative.items()
        if found
    }
    return ratios, errors


def joint_ratios_of(path: Path) -> dict[Block, float]:
    """Return the ratios by the earlier rule of all reports of a directional.json."""
    return joint_ratios(reports_of(json.loads(path.read_text(encoding="utf-8"))))[0]
