"""Slope: one block along its own update, and the learning rate that it could take, in numbers and in words."""

from __future__ import annotations

import math
from typing import NamedTuple


class Slope(NamedTuple):
    """One block along its own update; standard errors are over batches, NaN with a single one.

    Args:
        lr: the block's learning rate in the step that was measured.
        signal: s_b = <g, u_b>; above 0 if the update lowers the loss.
        signal_stderr: of it.
        curvature: u_b' G u_b.
        curvature_stderr: of it.
        best_lr: s_b / u_b' G u_b, the step that minimises the local quadratic while all other blocks are at rest.
        best_lr_stderr: of it; signal and curvature come from the same batches.
        noise: what rounding adds to the curvature.
        numel: elements of the block.
        ratio: the block's learning-rate ratio when it was measured (``lr_ratio`` of its group; 1 without).
        best_lr_beside: the same while the others move by their own learning rates,
            (s_b - sum over others of C_ba lr_a) / C_bb: they lower the same loss, so it is smaller as a rule.
        best_lr_beside_stderr: of it.
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
        """best_lr / lr; infinite or NaN at learning rate 0."""
        return self.best_lr / self.lr if self.lr else math.copysign(math.inf, self.best_lr)

    @property
    def factor_beside(self) -> float:
        """best_lr_beside / lr; infinite or NaN at learning rate 0."""
        return self.best_lr_beside / self.lr if self.lr else math.copysign(math.inf, self.best_lr_beside)

    @property
    def verdict(self) -> str:
        """best_lr_beside in words, two standard errors to either side; within a factor 1.5 a rate is about right."""
        best, error = self.best_lr_beside, self.best_lr_beside_stderr
        if not self.lr:
            return "learning rate 0"
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
            return f"could go up x{short(self.factor_beside)}"
        certain = high - low < 2 * abs(self.lr) and self.lr / 1.5 <= best <= 1.5 * self.lr
        return "about right" if certain else "not clear: more batches"


def bounded(factor: float, low: float, high: float) -> float:
    """Return a change of learning rate within its bounds; `low` if it is below 0, as the update raises the loss."""
    return min(max(factor, low), high)


def short(factor: float) -> str:
    """Two digits, never with an exponent that a reader has to work out."""
    return f"{float(f'{factor:.2g}'):g}"
