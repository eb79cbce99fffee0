"""DirectionalReport: the learning rate that each block could take, with standard errors. It is stored as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockwise_lr.blocks import Block
from blockwise_lr.directional.directional_values import FORMAT as FORMAT
from blockwise_lr.directional.directional_values import KIND as KIND
from blockwise_lr.directional.directional_values import read_values, report_values
from blockwise_lr.directional.run_ratios import RunRatios, ratios_along
from blockwise_lr.directional.slope import Slope
from blockwise_lr.directional.slope_averages import average_slopes
from blockwise_lr.files import write_json_atomic
from blockwise_lr.sharpness.measured_ratios import check_bounds

if TYPE_CHECKING:
    from rich.table import Table


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
        slopes = average_slopes(
            np.asarray(signals), np.asarray(curvatures), np.asarray(noise), weights,
            lrs=lrs, ratios=ratios, numels=numels,
        )  # fmt: skip
        return cls(
            blocks=dict(zip(blocks, slopes)),
            matrix=np.tensordot(weights, np.asarray(curvatures), 1).tolist(),
            hessian=None if hessians is None else np.tensordot(weights, np.asarray(hessians), 1).tolist(),
            samples=int(sum(samples)),
            batches=len(samples),
            step=None if step is None else int(step),  # NumPy's integers cannot be written as JSON
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

    def ratios(self, low: float = 0.1, high: float = 20.0) -> RunRatios:
        """Return the ratios that this report suggests, by the rule of :meth:`ratios_of_run`.

        One report is one moment of a run, and determines no block. The ratios are those of `measured` then, and
        `undetermined` says so. What the report itself says is in `alone`.

        Args:
            low, high: bounds of one measured change.

        Raises:
            ValueError: a block was measured at learning rate 0, or not 0 < low <= high.
        """
        return self.ratios_of_run([self], low, high)

    @classmethod
    def ratios_of_run(
        cls, reports: Sequence[DirectionalReport], low: float = 0.1, high: float = 20.0
    ) -> RunRatios:
        """Return the ratios that follow from several reports of one run, relative to the learning rate of FFN.

        :func:`blockwise_lr.directional.run_ratios.ratios_along` gives the formula. A block that the reports do not
        decide gets the ratio of `measured`; `undetermined` and `notes()` name it.

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
        return ratios_along(reports, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON. Non-finite numbers become null."""
        return report_values(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DirectionalReport:
        """Return the report that :meth:`to_dict` wrote.

        Raises:
            ValueError: `content` is not such a report.
        """
        return cls(**read_values(content))

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


def _solve_scaled(matrix: Any, right: Any) -> Any:
    """Return C^-1 r, solved in units in which every block has curvature 1.

    The curvatures of the blocks differ by many powers of ten.
    """
    scale = np.sqrt(np.abs(np.diagonal(matrix)))
    scale[scale == 0] = 1.0  # a block without curvature
    return np.linalg.lstsq(matrix / np.outer(scale, scale), right / scale, rcond=None)[0] / scale


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
