"""MeasuredRatios: learning-rate ratios with their uncertainty, and how to compute them from average sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockwise_lr.blocks import Block


@dataclass(frozen=True)
class MeasuredRatios(Mapping[Block, float]):
    """Learning-rate ratios with their uncertainty; a mapping from Block to ratio, for :func:`param_groups`.

    Args:
        ratios: block -> ratio, clipped to the bounds.
        unclipped: block -> ratio before clipping.
        stderr: block -> standard error of the unclipped ratio; NaN if the measurement had a single draw.
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
        """The blocks whose ratio was clipped to a bound."""
        return tuple(block for block in self.ratios if self.ratios[block] != self.unclipped[block])


def ratios_by_sharpness(
    sharpness: Mapping[Block, float],
    power: float,
    reference: Block,
    low: float,
    high: float,
    *,
    error: Callable[[Block], float],
) -> MeasuredRatios:
    """Return r(b) = (S(reference) / S(b)) ** power, clipped to [low, high].

    Args:
        sharpness: S(b) by block, above 0.
        power: the exponent; 0 makes every ratio 1.
        reference: the block whose ratio is 1.
        low, high: bounds of a ratio.
        error: takes a block and returns the standard error of log(S(reference) / S(b)).

    Raises:
        ValueError: a sharpness is not above 0, the reference block is missing, or a setting is out of range.
    """
    check_bounds(low, high)
    if not math.isfinite(power):
        raise ValueError(f"power is {power}; expected a finite number")
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
    stderr = {
        block: 0.0 if block == reference else abs(power) * unclipped[block] * error(block)
        for block in sharpness
    }
    ratios = {block: min(max(ratio, low), high) for block, ratio in unclipped.items()}
    return MeasuredRatios(ratios, unclipped, stderr)


def check_bounds(low: float, high: float) -> None:
    """Raise ValueError unless 0 < low <= high."""
    if not 0 < low <= high:
        raise ValueError(f"low is {low} and high {high}; expected 0 < low <= high")


def log_ratio_error(
    draws: Mapping[Block, Sequence[float]],
    weights: Sequence[float],
    means: Mapping[Block, float],
    reference: Block,
    block: Block,
) -> float:
    """Return the standard error of log(S(reference) / S(block)), from the draws that both share.

    Both come from the same batches, so common variation cancels in the ratio.

    Args:
        draws: block -> its draws.
        weights: of the draws; they add up to 1.
        means: S by block.
        reference, block: the two blocks.
    """
    if len(weights) < 2:
        return math.nan
    share = np.asarray(weights)
    deviations = np.asarray(draws[reference]) / means[reference] - np.asarray(draws[block]) / means[block]
    n = len(share)
    return float(np.sqrt(n / (n - 1) * np.sum((share * deviations) ** 2)))
