"""Ratios from a whole run: what each block could have learned at, averaged along the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from blockwise_lr.blocks import Block
from blockwise_lr.directional.slope import bounded

if TYPE_CHECKING:
    from blockwise_lr.directional.directional_report import DirectionalReport


def log_ratios_along(
    reports: Sequence[DirectionalReport], low: float, high: float
) -> tuple[dict[Block, float], dict[Block, float]]:
    r"""The mean over reports of every block's log learning rate over the anchor's, and its standard error.

        log r(b) = mean_t (l_t(b) - l_t(anchor)),   l_t(b) = log(r_t(b) * f_t(b)),   f_t = (C_t^-1 s_t) / lr_t

    with f within [low, high], low where it is below 0; r_t is the ratio that the block was measured at. C^-1 s are the
    learning rates that lower the loss most when all blocks move together: alone, most could take more.
    The anchor is FFN, so that the base learning rate is FFN's (without one: the largest block).

    A single report is one moment of a valley that the run crosses back and forth. The mean of the logarithms weighs how
    often a block overshoots against how far it could go when it does not.

    Args:
        reports: measured along one run; those at learning rate 0 tell nothing and are left out.
        low, high: bounds of one measured change.

    Returns:
        {block: log ratio}, {block: standard error of it, as if reports were independent; NaN of one}.

    Raises:
        ValueError: no report at a learning rate above 0.
    """
    moving = [report for report in reports if all(slope.lr > 0 for slope in report.values())]
    if not moving:
        raise ValueError(
            f"all {len(reports)} reports were measured at learning rate 0, which no ratio relates to the one that a "
            "block could take: measure between the first warm-up step and the end of the schedule"
        )
    sizes = {block: slope.numel for report in moving for block, slope in report.items()}
    anchor = Block.FFN if Block.FFN in sizes else max(sizes, key=sizes.__getitem__)
    relative: dict[Block, list[float]] = {block: [] for block in Block if block in sizes}
    for report in moving:
        if anchor not in report:
            continue
        together = report.joint_best_lr
        logs = {
            block: math.log(slope.ratio * bounded(together[block] / slope.lr, low, high))
            for block, slope in report.items()
        }
        for block, log in logs.items():
            relative[block].append(log - logs[anchor])
    means = {block: float(np.mean(found)) for block, found in relative.items() if found}
    errors = {
        block: float(np.std(found, ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan
        for block, found in relative.items()
        if found
    }
    return means, errors
