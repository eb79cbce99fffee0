"""Ratios from the reports of a run: what each block should have, and whether the measurement can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from blockwise_lr.blocks import Block
from blockwise_lr.directional.bounded_rates import Numbers, bounded_minimum, log_errors
from blockwise_lr.directional.slope import short
from blockwise_lr.optim.ratios import MEASURED_RATIOS
from blockwise_lr.sharpness.measured_ratios import MeasuredRatios

if TYPE_CHECKING:
    from blockwise_lr.directional.directional_report import DirectionalReport

DAMPING = 1.0
"""Multiple of its own curvature that each block is charged on top, as in Levenberg-Marquardt: a trust region."""

PRIOR_SPREAD = math.log(2)
"""How far the best ratio of a block lies from `measured`, in log: a factor of 2. It is the spread, over blocks, of the
ratios of runs that lose at most 0.03 nats to the best (studies/2026-11-measurement-rule)."""

REPORT_SCATTER = math.log(3)
"""The least scatter of one report that is believed, in log: a factor of 3, as in the reports of small models. Two
reports that happen to agree are two moments all the same."""


@dataclass(frozen=True)
class RunRatios(MeasuredRatios):
    """The ratios that the reports of a run suggest, and which blocks the reports decide.

    Args:
        ratios: block -> the ratio to train with, relative to the anchor.
        unclipped: the same; nothing is clipped after the mean over reports.
        stderr: block -> standard error of the ratio.
        anchor: the block with ratio 1: FFN, or the largest block of a model without FFN.
        alone: block -> the ratio by the reports alone, before it is drawn towards the prior.
        log_error: block -> standard error of log(alone).
        prior: block -> the ratio of `measured`, relative to the anchor.
        undetermined: block -> why the reports do not decide this block; its ratio is then that of the prior.
        reports: number of reports that were used.
    """

    anchor: Block
    alone: Mapping[Block, float]
    log_error: Mapping[Block, float]
    prior: Mapping[Block, float]
    undetermined: Mapping[Block, str]
    reports: int

    def interval(self, block: Block) -> tuple[float, float]:
        """Return the 95 % interval of the ratio by the reports alone."""
        factor = math.exp(min(1.96 * self.log_error[block], 700.0))
        return self.alone[block] / factor, self.alone[block] * factor

    def notes(self) -> list[str]:
        """Return one line for each block that the reports do not decide.

        Example:
            >>> ratios.notes()  # doctest: +SKIP
            ["NORM: not determined by this measurement (...), using measured's 32"]
        """
        return [
            f"{block.value.upper()}: not determined by this measurement ({why}), "
            f"using measured's {short(self.prior[block])}"
            for block, why in self.undetermined.items()
        ]

    def paste(self) -> str:
        """Return the ratios as the value of ``--ratios``, with three digits."""
        return ",".join(f"{block.value}={ratio:.3g}" for block, ratio in self.ratios.items())

    def to_dict(self) -> dict[str, dict[str, float | bool | str | None]]:
        """Return the values for JSON by block."""
        return {
            block.value: {
                "ratio": ratio,
                "measured": self.alone[block],
                "low": self.interval(block)[0],
                "high": self.interval(block)[1],
                "prior": self.prior[block],
                "determined": block not in self.undetermined,
                "why_not": self.undetermined.get(block),
            }
            for block, ratio in self.ratios.items()
        }


def ratios_along(
    reports: Sequence[DirectionalReport], low: float, high: float, *, damping: float = DAMPING
) -> RunRatios:
    r"""Return the ratio of each block relative to the anchor, drawn towards `measured` by its standard error.

    At each report t, the factors f_t by which the learning rates should change minimise the quadratic model of the
    loss, in units of the steps that were taken:

        f_t = argmin  f' (C_t + damping diag C_t) f / 2 - s_t' f,    low <= f <= high
        l_t(b) = log(r_t(b) f_t(b)) - log(r_t(FFN) f_t(FFN)),        r_t: the ratio during the measurement

    The model of the loss holds for short steps. The damping and the bounds keep the rates there. All rates stay above
    0, so a block whose update raises the loss at one moment gets a low factor and not a negative one.

    The mean m of l_t over the reports has a standard error e: the scatter of the reports over the root of their number.
    The scatter is at least REPORT_SCATTER, and at least what the standard errors of the signals imply. Then

        log r(b) = w m(b) + (1 - w) log prior(b),    w = PRIOR_SPREAD^2 / (PRIOR_SPREAD^2 + e^2)

    where the prior is `measured`. Where e > PRIOR_SPREAD, the reports know less than the prior, and the ratio is that
    of the prior.

    Args:
        reports: measured during one run. Reports at learning rate 0 carry no information and are left out.
        low, high: bounds of one measured change.
        damping: see the formula; 0 is the quadratic model as it was measured.

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
    moments = [
        moment for report in moving if anchor in (moment := _moment(report, anchor, low, high, damping))
    ]
    prior = {block: MEASURED_RATIOS.get(block, 1.0) / MEASURED_RATIOS.get(anchor, 1.0) for block in sizes}
    ratios: dict[Block, float] = {}
    alone, errors, stderr = dict[Block, float](), dict[Block, float](), dict[Block, float]()
    undetermined: dict[Block, str] = {}
    for block in (block for block in Block if block in sizes):
        found = np.array([moment[block] for moment in moments if block in moment]).reshape(-1, 2)
        mean, error = math.log(prior[block]), math.inf
        if len(found):
            mean, noise = float(np.mean(found[:, 0])), float(np.sqrt(np.mean(found[:, 1] ** 2)))
            scatter = float(np.std(found[:, 0], ddof=1)) if len(found) > 1 else 0.0
            error = (
                max(scatter, noise, REPORT_SCATTER) / math.sqrt(len(found)) if block is not anchor else 0.0
            )
        alone[block], errors[block] = math.exp(mean), error
        if error > PRIOR_SPREAD:
            undetermined[block] = _why(error, len(found) > 0 and noise > scatter, len(found))
            ratios[block], stderr[block] = prior[block], prior[block] * PRIOR_SPREAD
        else:
            weight = PRIOR_SPREAD**2 / (PRIOR_SPREAD**2 + error**2)
            ratios[block] = math.exp(weight * mean + (1 - weight) * math.log(prior[block]))
            stderr[block] = ratios[block] * math.sqrt(weight) * error
    return RunRatios(ratios, ratios, stderr, anchor, alone, errors, prior, undetermined, len(moments))


def _moment(
    report: DirectionalReport, anchor: Block, low: float, high: float, damping: float
) -> dict[Block, tuple[float, float]]:
    """Return, of each block, the log ratio relative to the anchor at one report and its error from the batches.

    The result is empty if the report lacks the anchor or holds numbers that are not finite. A block without curvature
    is left out: nothing limits its learning rate. A report of a single batch has no error from the batches.
    """
    kept = [i for i, slope in enumerate(report.values()) if slope.curvature > 0]
    blocks, slopes = [list(report)[i] for i in kept], [list(report.values())[i] for i in kept]
    lr = np.array([slope.lr for slope in slopes])
    signal = lr * np.array([slope.signal for slope in slopes])
    curvature = np.asarray(report.matrix, dtype=float)[np.ix_(kept, kept)] * np.outer(lr, lr)
    if anchor not in blocks or not (np.isfinite(signal).all() and np.isfinite(curvature).all()):
        return {}
    damped = curvature + damping * np.diag(np.diagonal(curvature))
    factors = bounded_minimum(damped, signal, low, high)
    logs = np.log(factors * [slope.ratio for slope in slopes])
    noise = np.nan_to_num(lr * np.array([slope.signal_stderr for slope in slopes]))
    by_signal: Numbers = log_errors(damped, factors, noise, low, high)
    at = blocks.index(anchor)
    errors = np.sqrt(np.sum((by_signal - by_signal[at]) ** 2, axis=1))
    return {block: (float(logs[i] - logs[at]), float(errors[i])) for i, block in enumerate(blocks)}


def _why(error: float, noise_of_batches: bool, count: int) -> str:
    """Describe how uncertain a block is, and what to measure more of."""
    more = "measure more batches, --batches" if noise_of_batches else "measure more checkpoints"
    of = "1 report" if count == 1 else f"{count} reports"
    size = f" uncertain by a factor of {short(math.exp(error))};" if error < 700 else ";"
    return f"{of},{size} {more}".replace(",;", ";")
