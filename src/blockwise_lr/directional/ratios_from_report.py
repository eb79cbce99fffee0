"""Ratios from a measurement: of average sharpness (the paper's approach), or along the optimizer's own update."""

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
    r"""Return the ratios that a measurement suggests.

    From average sharpness:

        r(b) = (S(reference) / S(b)) ** power,  within [low, high]                        (arXiv 2502.19002, section 4)

    The power 2/3 reproduces the ratios that the paper's authors tuned by hand. It was fitted to the sharpness in their
    figure for LLaMA 0.25B at 40 000 steps. For EMB, QK, FFN and VO it gives 11, 7.5, 4.9 and 3.2; the paper has 10, 8,
    6 and 4. Whether such ratios help a model is another question, because average sharpness is not the curvature along
    an optimizer's update.

    From DirectionalReports of one run:

        log r(b) = w m(b) + (1 - w) log measured(b)

    m(b) is the mean over reports of the log factor by which the learning rate of block b should change, relative to
    FFN's. At each report the factors of all blocks together minimise the local model of the loss within [low, high].
    w falls with the standard error of m, and is 0 where the reports know less than the prior, the ratios of `measured`
    (:func:`blockwise_lr.directional.run_ratios.ratios_along` gives the formulas). The result names those blocks in
    ``undetermined``. One report determines no block. The base learning rate is that of FFN. Reports are most
    informative at a learning rate well below the best uniform one (studies/2026-11-measurement-rule).

    Args:
        report: from :func:`blockwise_lr.measure_sharpness` or :func:`blockwise_lr.measure_directional`; a sequence of
            DirectionalReports; or a mapping from Block to S(b).
        power: exponent of the first rule. 0 makes every ratio 1; above 0, flatter blocks get higher ratios. Default
            2/3. Not used for a DirectionalReport.
        reference: the block with ratio 1 in the first rule. Default NORM, the sharpest block in the paper. Not used for
            a DirectionalReport.
        low, high: bounds of a ratio; for a DirectionalReport, bounds of its change. The default of `high` is 20. The
            default of `low` is 1, or 0.1 for DirectionalReports. A block that overshoots can therefore be lowered.

    Returns:
        MeasuredRatios, with first-order standard errors. In the ratio of two sharpnesses from the same batches, common
        fluctuations cancel. The standard errors from several reports treat the reports as independent. For
        DirectionalReports it is a :class:`blockwise_lr.directional.run_ratios.RunRatios`.

    Raises:
        ValueError: the report lacks the reference block; a sharpness is not above 0; no DirectionalReport has a
            learning rate above 0; not 0 < low <= high; or the power is not finite.

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
