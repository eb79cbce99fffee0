"""Ratios from a measurement: of average sharpness (the paper's logic), or along the optimizer's own update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from blockwise_lr.blocks import Block
from blockwise_lr.directional.directional_report import DirectionalReport
from blockwise_lr.sharpness import SharpnessReport
from blockwise_lr.sharpness.measured_ratios import MeasuredRatios, ratios_by_sharpness


def ratios_from_sharpness(
    report: SharpnessReport | DirectionalReport | Sequence[DirectionalReport] | Mapping[Block, float],
    power: float = 2 / 3,
    reference: Block = Block.NORM,
    low: float | None = None,
    high: float = 20.0,
) -> MeasuredRatios:
    r"""Ratios from a measurement.

    From average sharpness:

        r(b) = (S(reference) / S(b)) ** power,  within [low, high]                        (arXiv 2502.19002, section 4)

    The power 2/3 fits the ratios that the paper's authors tuned by hand, from the sharpness that their figure shows
    at 40 000 steps of LLaMA 0.25B (11, 7.5, 4.9, 3.2 for EMB, QK, FFN, VO; theirs are 10, 8, 6, 4). Whether such
    ratios help a model is another question: average sharpness is not the curvature along an optimizer's update.

    From a DirectionalReport, with r_now the ratio that the block was measured at:

        r(b) = r_now(b) * lr*_b / lr_b,  within r_now(b) * [low, high];   low where the update raises the loss

    with lr*_b the rate that is best beside the others (``best_lr_beside``), which keep theirs.

    From DirectionalReports along a run, with the learning rates that lower the loss most when all blocks move together,
    the geometric mean over FFN's, so that the base learning rate is FFN's:

        log r(b) = mean of log(f(b)) - log(f(FFN)),    f(b) = r_now(b) * (C^-1 s)_b / lr_b,  bounded as above

    This is the rule that helped in studies/2026-11-ratio-rules. Reports of a run with a learning rate well below the
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
    bounds = {"high": high} if low is None else {"low": low, "high": high}
    if isinstance(report, DirectionalReport):
        return report.ratios(**bounds)
    if isinstance(report, Sequence):
        return DirectionalReport.ratios_of_run(report, **bounds)
    if isinstance(report, SharpnessReport):
        return report.ratios(power, reference, **bounds)
    sharpness = {Block(block): float(value) for block, value in report.items()}
    return ratios_by_sharpness(
        sharpness, power, reference, 1.0 if low is None else low, high, error=lambda block: math.nan
    )
