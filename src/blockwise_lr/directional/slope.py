"""Slope: the loss along the update of one block, and the learning rate that this block could take."""

from __future__ import annotations

import math
from typing import NamedTuple

FARTHEST = 20.0
"""The largest change of a learning rate for which the local quadratic model is believed."""


class Slope(NamedTuple):
    """The loss along the update u_b of one block. Standard errors are over batches, and NaN for a single batch.

    Args:
        lr: the current learning rate: that of the block in the measured step.
        signal: s_b = <g, u_b>; above 0 if the update lowers the loss.
        signal_stderr: standard error of `signal`.
        curvature: C_bb = u_b' G u_b.
        curvature_stderr: standard error of `curvature`.
        best_lr: s_b / C_bb, the learning rate that minimises the local quadratic model if all other blocks are fixed.
        best_lr_stderr: standard error of `best_lr`; it accounts for signal and curvature coming from the same batches.
        noise: contribution of rounding to the curvature.
        numel: number of elements of the block.
        ratio: learning-rate ratio of the block during the measurement (``lr_ratio`` of its group; 1 if it has none).
        best_lr_beside: the best learning rate of this block if the other blocks move at their current learning rates,
            (s_b - sum over others of C_ba lr_a) / C_bb. It is usually smaller, because the others lower the same loss.
        best_lr_beside_stderr: standard error of `best_lr_beside`.
    """

    lr: float
    signal: float
    signal_stderr: float
    curvature: float
    curvature_stderr: float
    best_lr: float
    best_lr_stderr: float
    noise: float
    numel: int
    ratio: float = 1.0
    best_lr_beside: float = math.nan
    best_lr_beside_stderr: float = math.nan

    @property
    def factor(self) -> float:
        """`best_lr` over the current learning rate; infinite or NaN at learning rate 0."""
        return self.best_lr / self.lr if self.lr else math.copysign(math.inf, self.best_lr)

    @property
    def factor_beside(self) -> float:
        """`best_lr_beside` over the current learning rate; infinite or NaN at learning rate 0."""
        return self.best_lr_beside / self.lr if self.lr else math.copysign(math.inf, self.best_lr_beside)

    @property
    def verdict(self) -> str:
        """The meaning of `best_lr_beside` in words, given an interval of two standard errors to either side.

        A learning rate within a factor of 1.5 of the best counts as about right. Factors above FARTHEST are not named,
        because the quadratic model does not hold that far.
        """
        best, error = self.best_lr_beside, self.best_lr_beside_stderr
        if not self.lr:
            return "learning rate 0"
        if not self.curvature:
            return "no effect on logits"
        if math.isnan(error):
            return "one batch: no error bars"
        if self.noise > 0.1 * abs(self.curvature):
            return "not clear: rounding"
        low, high = best - 2 * error, best + 2 * error
        if high < 0:
            return "raises the loss"
        if high < self.lr / 1.5:
            return f"overshoots: x{short(self.factor_beside)} is right" if best > 0 else "overshoots"
        if low > 1.5 * self.lr:
            return f"could go up {room(self.factor_beside)}"
        certain = high - low < 2 * abs(self.lr) and self.lr / 1.5 <= best <= 1.5 * self.lr
        return "about right" if certain else "not clear: more batches"


def short(factor: float) -> str:
    """Format a number with two significant digits and, in the usual range, without an exponent."""
    return f"{float(f'{factor:.2g}'):g}"


def room(factor: float) -> str:
    """Format a factor by which a learning rate could go up, up to FARTHEST."""
    return f"x{short(factor)}" if factor <= FARTHEST else f"x{short(FARTHEST)} or more"
