"""Ratios from several reports of one run: the average of the learning rates that each block could have taken."""

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
    r"""Return the mean log ratio of each block relative to the anchor, and its standard error.

        log r(b) = mean_t (l_t(b) - l_t(anchor)),   l_t(b) = log(r_t(b) * f_t(b)),   f_t = (C_t^-1 s_t) / lr_t

    r_t is the ratio at which the block was measured. f is bounded to [low, high], and is `low` where it is below 0.
    C^-1 s are the learning rates that lower the loss most when all blocks move together; most blocks could take more if
    the others were fixed. The anchor is FFN, so the base learning rate is that of FFN. A model without FFN is anchored
    at its largest block.

    A single report shows one moment of a run that oscillates across a valley. The mean of the logarithms weighs how
    often a block overshoots against how far it could go when it does not.

    Args:
        reports: measured during one run. Reports at learning rate 0 carry no information and are left out.
        low, high: bounds of one measured change.

    Returns:
        The log ratio of each block, and its standard error. The standard error treats the reports as independent and is
        NaN for a single report.

    Raises:
        ValueError: no report has a learning rate above 0.
    """
    moving = [report for report in reports if all(slope.lr > 0 for slope in report.values())]
    if not moving:
        raise ValueError(
            f"all {len(reports)} reports were measured at learning rate 0, from which no ratio follows: "
            "measure between the first warm-up step and the end of the schedule"
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
