"""DirectionalReport: the learning rate that each block could take, with standard errors. It is stored as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockwise_lr.blocks import Block
from blockwise_lr.directional.run_ratios import log_ratios_along
from blockwise_lr.directional.slope import Slope, bounded
from blockwise_lr.files import write_json_atomic
from blockwise_lr.json_values import number_or_nan, numbers, typed
from blockwise_lr.sharpness.measured_ratios import MeasuredRatios, check_bounds

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
KIND = "directional"


@dataclass(frozen=True)
class DirectionalReport(Mapping[Block, Slope]):
    """The result of :func:`measure_directional`; a mapping from Block to :class:`Slope`.

    Args:
        blocks: the slope of each block, in the order of :class:`Block`. Blocks that the optimizer does not move are
            left out.
        matrix: C = U'GU over these blocks, (k, k).
        hessian: U'HU with the true Hessian; None if it was not requested.
        samples: number of predicted tokens (samples) in the measurement.
        batches: number of batches in the measurement.
        step: the training step; None if it was not given.

    Example:
        >>> report[Block.NORM].verdict  # doctest: +SKIP
        'could go up x20'
    """

    blocks: Mapping[Block, Slope]
    matrix: Sequence[Sequence[float]]
    hessian: Sequence[Sequence[float]] | None
    samples: int
    batches: int
    step: int | None = None

    @classmethod
    def from_draws(
        cls,
        blocks: Sequence[Block],
        *,
        signals: npt.ArrayLike,
        curvatures: npt.ArrayLike,
        noise: npt.ArrayLike,
        samples: Sequence[int],
        hessians: npt.ArrayLike | None,
        lrs: Sequence[float],
        ratios: Sequence[float],
        numels: Sequence[int],
        step: int | None,
    ) -> DirectionalReport:
        """Return the average over batches, each weighted by its number of samples.

        Args:
            blocks: the k blocks.
            signals: s of each batch, (batches, k).
            curvatures: C of each batch, (batches, k, k).
            noise: rounding noise in the diagonal of C, (batches, k).
            samples: number of samples in each batch.
            hessians: U'HU of each batch, (batches, k, k), or None.
            lrs, ratios, numels: learning rate, ratio and number of elements of each block.
            step: the training step, or None.
        """
        weights = np.asarray(samples, dtype=float) / sum(samples)
        s, matrices, own = np.asarray(signals), np.asarray(curvatures), np.asarray(lrs, dtype=float)
        c = np.diagonal(matrices, axis1=1, axis2=2)
        signal, curvature = weights @ s, weights @ c
        best = signal / curvature
        beside = s - matrices @ own + c * own  # the signals after the other blocks have moved
        best_beside = (weights @ beside) / curvature
        # First-order propagation of errors: lr* = s / c, so batch k changes it by (s_k - lr* c_k) / c.
        deviations = (s, c, (s - best * c) / curvature, (beside - best_beside * c) / curvature)
        errors = [_error(values, weights) for values in deviations]
        slopes = {
            block: Slope(
                lr=lrs[i],
                signal=float(signal[i]),
                signal_stderr=float(errors[0][i]),
                curvature=float(curvature[i]),
                curvature_stderr=float(errors[1][i]),
                best_lr=float(best[i]),
                best_lr_stderr=float(errors[2][i]),
                noise=float(weights @ np.asarray(noise)[:, i]),
                numel=numels[i],
                ratio=ratios[i],
                best_lr_beside=float(best_beside[i]),
                best_lr_beside_stderr=float(errors[3][i]),
            )
            for i, block in enumerate(blocks)
        }
        return cls(
            blocks=slopes,
            matrix=np.tensordot(weights, matrices, 1).tolist(),
            hessian=None if hessians is None else np.tensordot(weights, np.asarray(hessians), 1).tolist(),
            samples=int(sum(samples)),
            batches=len(samples),
            step=step,
        )

    def __getitem__(self, block: Block | str) -> Slope:
        """Return the slope of a block.

        Raises:
            KeyError: the report does not have this block. The message lists its blocks.
        """
        try:
            return self.blocks[Block(block)]
        except (KeyError, ValueError):
            there = ", ".join(b.value for b in self.blocks)
            raise KeyError(f"no block {block!r} in this report; it has {there}") from None

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __contains__(self, block: object) -> bool:
        return block in self.blocks

    @property
    def eigenvalues(self) -> list[float]:
        """The eigenvalues of C, largest first: the curvature along combinations of block updates."""
        return [float(x) for x in np.linalg.eigvalsh(np.asarray(self.matrix))[::-1]]

    @property
    def joint_best_lr(self) -> dict[Block, float]:
        """C^-1 s: the learning rates that minimise the local quadratic model when all blocks move at once.

        The value is below 0 for a block whose update raises the loss after the other blocks have moved.
        """
        signal = np.array([slope.signal for slope in self.blocks.values()])
        return dict(zip(self.blocks, map(float, _solve_scaled(np.asarray(self.matrix), signal))))

    def ratios(self, low: float = 0.5, high: float = 20.0) -> MeasuredRatios:
        """Return the ratios that this report suggests.

            r(b) = r_now(b) * lr*_b / lr_b,    lr*_b: the best learning rate of block b while the others keep theirs

        Args:
            low, high: bounds of lr*_b / lr_b. A block whose update raises the loss gets `low`.

        Raises:
            ValueError: a block was measured at learning rate 0, or not 0 < low <= high.
        """
        check_bounds(low, high)
        for block, slope in self.items():
            if not slope.lr > 0:
                raise ValueError(
                    f"{block.value} was measured at learning rate {slope.lr:g}, from which no ratio follows: "
                    "measure between the first warm-up step and the end of the schedule"
                )
        unclipped = {block: slope.ratio * slope.factor_beside for block, slope in self.items()}
        ratios = {
            block: slope.ratio * bounded(slope.factor_beside, low, high) for block, slope in self.items()
        }
        errors = {
            block: slope.ratio * slope.best_lr_beside_stderr / slope.lr for block, slope in self.items()
        }
        return MeasuredRatios(ratios, unclipped, errors)

    @classmethod
    def ratios_of_run(
        cls, reports: Sequence[DirectionalReport], low: float = 0.1, high: float = 20.0
    ) -> MeasuredRatios:
        """Return the ratios that follow from several reports of one run, relative to the learning rate of FFN.

        :func:`blockwise_lr.directional.run_ratios.log_ratios_along` gives the formula.

        Args:
            reports: measured during one run.
            low, high: bounds of one measured change.

        Raises:
            ValueError: an element is not a report, no report has a learning rate above 0, or not 0 < low <= high.
        """
        check_bounds(low, high)
        for each in reports:
            if not isinstance(each, DirectionalReport):
                raise ValueError(f"ratios: expected DirectionalReports, got {each!r} among {len(reports)}")
        logs, errors = log_ratios_along(reports, low, high)
        ratios = {block: math.exp(log) for block, log in logs.items()}
        return MeasuredRatios(
            ratios, ratios, {block: ratios[block] * error for block, error in errors.items()}
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON. Non-finite numbers become null."""
        return {
            "format": FORMAT,
            "kind": KIND,
            "step": self.step,
            "samples": self.samples,
            "batches": self.batches,
            "blocks": {
                block.value: {k: v if math.isfinite(v) else None for k, v in slope._asdict().items()}
                for block, slope in self.blocks.items()
            },
            "matrix": [list(row) for row in self.matrix],
            "eigenvalues": self.eigenvalues,
            "joint_best_lr": {block.value: lr for block, lr in self.joint_best_lr.items()},
            "hessian": None if self.hessian is None else [list(row) for row in self.hessian],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DirectionalReport:
        """Return the report that :meth:`to_dict` wrote.

        Raises:
            ValueError: `content` is not such a report.
        """
        if not isinstance(content, Mapping) or (content.get("kind"), content.get("format")) != (KIND, FORMAT):
            raise ValueError(f'not a directional report; expected "kind": "{KIND}" and "format": {FORMAT}')
        try:
            blocks = {Block(block): _slope(**slope) for block, slope in content["blocks"].items()}
            hessian = content["hessian"]
            return cls(
                blocks=blocks,
                matrix=_square(content["matrix"], len(blocks)),
                hessian=None if hessian is None else _square(hessian, len(blocks)),
                samples=typed(content["samples"], int),
                batches=typed(content["batches"], int),
                step=None if content["step"] is None else typed(content["step"], int),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"not a directional report, or a damaged one: {error!r}") from None

    def table(self) -> Table:
        """Return a rich table.

        :func:`blockwise_lr.directional.directional_figure.directional_table` describes its columns.
        """
        from blockwise_lr.directional.directional_figure import directional_table

        return directional_table(self)

    def plot(self, path: str | Path) -> Path:
        """Save a figure and return its path.

        :func:`blockwise_lr.directional.directional_figure.plot_directional` describes the figure.
        """
        from blockwise_lr.directional.directional_figure import plot_directional

        return plot_directional([self], path)

    def to_json(self, path: str | Path) -> None:
        """Write the report to `path`. An interrupted write leaves no partial file."""
        write_json_atomic(Path(path), self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> DirectionalReport:
        """Read a report that :meth:`to_json` wrote.

        Raises:
            ValueError: the file does not contain such a report. The message contains the path.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _slope(numel: Any, **values: Any) -> Slope:
    if "best_lr_beside" not in values:
        raise ValueError(
            "it has no best_lr_beside, because an earlier version measured after the update: measure again"
        )
    return Slope(numel=typed(numel, int), **{name: number_or_nan(value) for name, value in values.items()})


def _square(rows: Any, size: int) -> list[list[float]]:
    found = [numbers(row) for row in typed(rows, list)]
    if not size or [len(row) for row in found] != [size] * size:
        raise ValueError(f"expected a matrix of {size} rows of {size} numbers, for at least one block")
    return found


def _solve_scaled(matrix: Any, right: Any) -> Any:
    """Return C^-1 r, solved in units in which every block has curvature 1.

    The curvatures of the blocks differ by many powers of ten.
    """
    scale = np.sqrt(np.abs(np.diagonal(matrix)))
    scale[scale == 0] = 1.0  # a block without curvature
    return np.linalg.lstsq(matrix / np.outer(scale, scale), right / scale, rcond=None)[0] / scale


def _error(values: Any, weights: Any) -> Any:
    """Return the standard errors of weighted means over batches, column by column."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1], math.nan)
    deviations = weights[:, None] * (values - weights @ values)
    return np.sqrt(n / (n - 1) * np.sum(deviations**2, axis=0))


def reports_of(values: Mapping[str, Any]) -> list[DirectionalReport]:
    """Return every report of a directional.json, earliest first: those under "earlier", then the last one.

    Raises:
        ValueError: `values` is not a directional report.
    """
    if not isinstance(earlier := values.get("earlier", []), list):
        raise ValueError(
            f'not a directional report: its "earlier" is {type(earlier).__name__}; expected a list'
        )
    return [DirectionalReport.from_dict(each) for each in [*earlier, values]]
