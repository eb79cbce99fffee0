"""SharpnessReport: the sharpness of blocks, layers and parameters with standard errors; JSON, tables and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockwise_lr.blocks import Block
from blockwise_lr.files import write_json_atomic
from blockwise_lr.sharpness.estimate import Estimate
from blockwise_lr.sharpness.histogram import Histogram
from blockwise_lr.sharpness.measured_ratios import MeasuredRatios, log_ratio_error, ratios_by_sharpness
from blockwise_lr.sharpness.parameter_parts import OUTSIDE, Part
from blockwise_lr.sharpness.report_fields import FORMAT as FORMAT
from blockwise_lr.sharpness.report_fields import to_fields, to_values

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor


@dataclass(frozen=True)
class SharpnessReport(Mapping[Block, Estimate]):
    """The result of :func:`blockwise_lr.measure_sharpness`; a mapping from Block to :class:`Estimate`.

    Args:
        blocks: block -> estimate, in the order of :class:`Block`.
        per_parameter: name -> estimate. The parts of a fused weight that is not split are ``name:q`` and so on.
        per_layer: layer ("model.layers.3", or "outside" for parameters outside all layers) -> block -> estimate.
        draws: block -> its independent measurements (draws), in the order of measurement.
        weights: the weight of each draw, which is its batch's share of all samples. They add up to 1.
        estimator: "fisher", "empirical", "hutchinson" or "optimizer".
        method: the estimator in words.
        samples: number of predicted tokens (samples).
        batches: number of batches.
        probes: number of draws per batch.
        seed: seed of the random labels or signs.
        step: the training step; None if not given.
        stderr_over: what the standard errors are over: "batches", "probes" (of one batch), or None.
        histograms: block -> its elements by sharpness; empty if not measured.

    Example:
        >>> report[Block.QK].mean, report["qk"].numel  # doctest: +SKIP
        (2.1e-06, 33554432)
    """

    blocks: Mapping[Block, Estimate]
    per_parameter: Mapping[str, Estimate]
    per_layer: Mapping[str, Mapping[Block, Estimate]]
    draws: Mapping[Block, Sequence[float]]
    weights: Sequence[float]
    estimator: str
    method: str
    samples: int
    batches: int
    probes: int
    seed: int
    step: int | None = None
    stderr_over: str | None = None
    histograms: Mapping[Block, Histogram] = field(default_factory=dict)

    @classmethod
    def from_draws(
        cls,
        parts: Sequence[Part],
        traces: Sequence[Tensor | npt.NDArray[np.float64]],
        samples: Sequence[int],
        *,
        estimator: str,
        method: str,
        seed: int,
        step: int | None,
        histograms: Mapping[Block, Histogram] | None,
    ) -> SharpnessReport:
        """Sum the draws of an estimator by block, layer and parameter.

        Args:
            parts: the parts of the model's parameters.
            traces: a (probes, parts) tensor for each batch.
            samples: number of samples of each batch. Batches are weighted in proportion.
            estimator, method, seed, step: as in :class:`SharpnessReport`.
            histograms: as in :class:`SharpnessReport`. None: not measured.
        """
        by_batch = [np.asarray(batch, dtype=np.float64) for batch in traces]
        probes = len(by_batch[0])
        over: str | None
        if len(traces) > 1:
            over, independent = "batches", np.stack([batch.mean(0) for batch in by_batch])
            weights = np.asarray(samples, dtype=float) / sum(samples)
        else:
            over, independent = ("probes" if probes > 1 else None), by_batch[0]
            weights = np.full(probes, 1 / probes)

        def estimate(indices: Sequence[int]) -> Estimate:
            numel = sum(parts[i].numel for i in indices)
            return Estimate(*_mean_and_error(independent[:, list(indices)].sum(1) / numel, weights), numel)

        by_block = _grouped(parts, lambda part: part.block)
        ordered = {block: by_block[block] for block in Block if block in by_block}
        layers = _grouped(parts, lambda part: part.layer)
        return cls(
            blocks={block: estimate(indices) for block, indices in ordered.items()},
            per_parameter={part.name: estimate([i]) for i, part in enumerate(parts)},
            per_layer={
                layer: {
                    block: estimate([i for i in indices if parts[i].block is block])
                    for block in ordered
                    if any(parts[i].block is block for i in indices)
                }
                for layer, indices in sorted(layers.items(), key=lambda item: item[0] == OUTSIDE)
            },
            draws={
                block: (independent[:, indices].sum(1) / sum(parts[i].numel for i in indices)).tolist()
                for block, indices in ordered.items()
            },
            weights=weights.tolist(),
            estimator=estimator,
            method=method,
            samples=int(sum(samples)),
            batches=len(traces),
            probes=probes,
            seed=int(seed),  # NumPy's integers cannot be written as JSON
            step=None if step is None else int(step),
            stderr_over=over,
            histograms=histograms or {},
        )

    def __getitem__(self, block: Block | str) -> Estimate:
        """Return the estimate of a block.

        Raises:
            KeyError: the report has no such block. The message lists its blocks.
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

    def ratios(
        self, power: float = 2 / 3, reference: Block = Block.NORM, low: float = 1.0, high: float = 20.0
    ) -> MeasuredRatios:
        """Return learning-rate ratios by average sharpness: r(b) = (S(reference) / S(b)) ** power.

        Args:
            power: the exponent. 0 makes every ratio 1; above 0, flatter blocks learn faster. Default: 2/3.
            reference: the block whose ratio is 1. Default: NORM, the paper's sharpest.
            low, high: bounds of a ratio. Default: 1 and 20.

        Raises:
            ValueError: the report lacks the reference block, a sharpness is not above 0, or a setting is out of range.

        :func:`blockwise_lr.ratios_from_sharpness` does the same for plain values.
        """
        sharpness = {block: estimate.mean for block, estimate in self.items()}
        return ratios_by_sharpness(
            sharpness,
            power,
            reference,
            low,
            high,
            error=lambda block: log_ratio_error(self.draws, self.weights, sharpness, reference, block),
        )

    def table(self) -> Table:
        """Return a rich table of the blocks, flattest first (needs the extra "train")."""
        from blockwise_lr.sharpness.table import table

        return table(self)

    def plot(self, path: str | Path) -> Path:
        """Plot the blocks as bars on a logarithmic scale, as PNG, SVG or PDF (needs the extra "plot").

        Args:
            path: the figure's file, ending in .png, .svg or .pdf.

        Returns:
            The path.
        """
        from blockwise_lr.sharpness.plot import plot_blocks

        return plot_blocks(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values. Numbers that are not finite become None."""
        return to_values(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SharpnessReport:
        """Return the report from the values of :meth:`to_dict`.

        Raises:
            ValueError: the values are not a report, or are damaged.
        """
        return cls(**to_fields(content))

    def to_json(self, path: str | Path) -> None:
        """Write the report to `path`. An interrupted write leaves no partial file."""
        write_json_atomic(Path(path), self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> SharpnessReport:
        """Read a report that :meth:`to_json` wrote.

        Raises:
            ValueError: the file is not a report. The message contains the path.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _mean_and_error(values: Any, weights: Any) -> tuple[float, float]:
    """Return the weighted mean of independent draws, and its standard error from their spread."""
    mean = float(weights @ values)
    if (n := len(values)) < 2:
        return mean, math.nan
    return mean, float(np.sqrt(n / (n - 1) * np.sum((weights * (values - mean)) ** 2)))


def _grouped(parts: Sequence[Part], key: Any) -> dict[Any, list[int]]:
    """Return the indices of the parts by key."""
    groups: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(key(part), []).append(i)
    return groups
