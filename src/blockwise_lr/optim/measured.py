"""Ratios from a measurement: of average sharpness (the paper's logic), or along the optimizer's own update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockwise_lr.blocks import Block
from blockwise_lr.optim.directional_report import DirectionalReport
from blockwise_lr.optim.trajectory import bounded, log_ratios_along
from blockwise_lr.sharpness import SharpnessReport


@dataclass(frozen=True)
class MeasuredRatios(Mapping[Block, float]):
    """Learning-rate ratios with their uncertainty; a mapping from Block to ratio, for :func:`param_groups`.

    Args:
        ratios: block -> ratio, within the bounds.
        unclipped: the same before it was brought within them.
        stderr: standard error of the unclipped ratio; NaN where the measurement had a single draw.
    """

    ratios: Mapping[Block, float]
    unclipped: Mapping[Block, float]
    stderr: Mapping[Block, float]

    def __getitem__(self, block: Block) -> float:
        return self.ratios[block]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.ratios)

    def __len__(self) -> int:
        return len(self.ratios)

    @property
    def clipped(self) -> tuple[Block, ...]:
        """The blocks that a bound holds back."""
        return tuple(block for block in self.ratios if self.ratios[block] != self.unclipped[block])


def ratios_from_sharpness(
    report: SharpnessReport | DirectionalReport | Sequence[DirectionalReport] | Mapping[Block, float],
    power: float = 2 / 3,
    reference: Block = Block.NORM,
    low: float | None = None,
    high: float = 20.0,
) -> MeasuredRatios:
    r"""Ratios from a measurement.

    From average sharpness:

        r(b) = (S(reference) / S(b)) ** power,  within [low, high]                        (METHOD section 3)

    The power 2/3 fits the ratios that the paper's authors tuned by hand, from the sharpness that their figure shows
    at 40 000 steps of LLaMA 0.25B (11, 7.5, 4.9, 3.2 for EMB, QK, FFN, VO; theirs are 10, 8, 6, 4). Whether such
    ratios help a model is another question: average sharpness is not the curvature along an optimizer's update.

    From a DirectionalReport, with r_now the ratio that the block was measured at:

        r(b) = r_now(b) * lr*_b / lr_b,  within r_now(b) * [low, high];   low where the update raises the loss

    with lr*_b the rate that is best beside the others (``best_lr_beside``), which keep theirs.

    From DirectionalReports along a run, with the learning rates that lower the loss most when all blocks move together,
    the geometric mean over FFN's, so that the base learning rate is FFN's:

        log r(b) = mean of log(f(b)) - log(f(FFN)),    f(b) = r_now(b) * (C^-1 s)_b / lr_b,  bounded as above

    Of the rules here the one that results/ratios found to help. Reports of a run with a learning rate well below the
    best uniform one tell most.

    Args:
        report: from :func:`blockwise_lr.measure_sharpness` or :func:`blockwise_lr.measure_directional`; a sequence of
            the latter; or plain values, block -> S(b).
        power: 0 makes every ratio 1; above 0 flatter blocks learn faster. Default 2/3. Not for a DirectionalReport.
        reference: the block whose ratio is 1. Default NORM, the paper's sharpest. Not for a DirectionalReport.
        low, high: bounds of a ratio, for a DirectionalReport of its change. Defaults 1 (0.5 for a DirectionalReport,
            0.1 for each of several: a block that overshoots is lowered) and 20.

    Returns:
        MeasuredRatios. Standard errors are first-order: sharpness of both blocks comes from the same batches, whose
        common ups and downs cancel in a ratio. Of several reports they are over reports, as if these were independent.

    Raises:
        ValueError: the report has no reference block; a sharpness that is not above 0; DirectionalReports only at
            learning rate 0, or none; bounds that are not 0 < low <= high, or a power that is not finite.

    Example:
        >>> figure = {Block.EMB: 8.5e-7, Block.QK: 1.5e-6, Block.FFN: 2.9e-6, Block.VO: 5.5e-6, Block.NORM: 3.1e-5}
        >>> {str(b): round(r, 1) for b, r in ratios_from_sharpness(figure).items()}
        {'emb': 11.0, 'qk': 7.5, 'ffn': 4.9, 'vo': 3.2, 'norm': 1.0}
    """
    if low is None:
        low = 0.5 if isinstance(report, DirectionalReport) else 0.1 if isinstance(report, Sequence) else 1.0
    if not math.isfinite(power):
        raise ValueError(f"power is {power}; expected a finite number")
    if not 0 < low <= high:
        raise ValueError(f"low is {low} and high {high}; expected 0 < low <= high")
    if isinstance(report, DirectionalReport):
        return _from_directional(report, low, high)
    if isinstance(report, Sequence):
        return _from_run(report, low, high)
    sharpness = (
        {b: e.mean for b, e in report.items()}
        if isinstance(report, SharpnessReport)
        else {Block(b): float(s) for b, s in report.items()}
    )
    if reference not in sharpness:
        there = ", ".join(b.value for b in sharpness)
        raise ValueError(
            f"the report has no block {Block(reference).value}, to which the others are compared; it has {there}: "
            "give one of these as reference"
        )
    for block, value in sharpness.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"the sharpness of {block.value} is {value:.3g}; expected a finite number above 0: "
                'measure more batches, or with estimator="fisher", which cannot be negative'
            )
    unclipped = {block: (sharpness[reference] / value) ** power for block, value in sharpness.items()}
    errors = {
        block: abs(power) * unclipped[block] * _log_ratio_error(report, reference, block)
        for block in sharpness
    }
    ratios = {block: min(max(ratio, low), high) for block, ratio in unclipped.items()}
    return MeasuredRatios(ratios, unclipped, errors)


def _from_directional(report: DirectionalReport, low: float, high: float) -> MeasuredRatios:
    for block, slope in report.items():
        if not slope.lr > 0:
            raise ValueError(
                f"{block.value} was measured at learning rate {slope.lr:g}, which no ratio relates to the one it could "
                "take: measure between the first warm-up step and the end of the schedule"
            )
    unclipped = {block: slope.ratio * slope.factor_beside for block, slope in report.items()}
    ratios = {block: slope.ratio * bounded(slope.factor_beside, low, high) for block, slope in report.items()}
    errors = {block: slope.ratio * slope.best_lr_beside_stderr / slope.lr for block, slope in report.items()}
    return MeasuredRatios(ratios, unclipped, errors)


def _from_run(reports: Sequence[DirectionalReport], low: float, high: float) -> MeasuredRatios:
    logs, errors = log_ratios_along(reports, low, high)
    ratios = {block: math.exp(log) for block, log in logs.items()}
    return MeasuredRatios(ratios, ratios, {block: ratios[block] * error for block, error in errors.items()})


def _log_ratio_error(
    report: SharpnessReport | Mapping[Block, float], reference: Block, block: Block
) -> float:
    """Standard error of log(S(reference) / S(block)), from the draws that both share."""
    if block is reference:
        return 0.0
    if not isinstance(report, SharpnessReport) or len(report.weights) < 2:
        return math.nan
    weights = np.asarray(report.weights)
    deviations = (
        np.asarray(report.draws[reference]) / report[reference].mean
        - np.asarray(report.draws[block]) / report[block].mean
    )
    n = len(weights)
    return float(np.sqrt(n / (n - 1) * np.sum((weights * deviations) ** 2)))
