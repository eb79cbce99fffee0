"""The search space: base learning rate, warm-up and one ratio for each block, all on a log2 scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blockwise_lr.blocks import Block

Vector = np.ndarray[Any, np.dtype[np.float64]]
"""The log2 values of a point, in the order of `Space.names`."""

SHARED = ("base_lr", "warmup")
"""The names that every space has, before those of its blocks."""

_DIGITS = 4  # significant digits of a point, so that a point read from JSON equals the one written


@dataclass(frozen=True)
class Point:
    """One candidate: the settings of one training run.

    Args:
        base_lr: peak learning rate of a block whose ratio is 1.
        warmup: length of the linear warm-up, as a share of the steps.
        ratios: learning-rate ratio by block; a block that is not named has ratio 1.
    """

    base_lr: float
    warmup: float
    ratios: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {"base_lr": self.base_lr, "warmup": self.warmup, "ratios": dict(self.ratios)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """Return the point that :meth:`to_dict` wrote."""
        return cls(float(values["base_lr"]), float(values["warmup"]), dict(values["ratios"]))


@dataclass(frozen=True)
class Space:
    """A box on a log2 scale, and the mapping between its vectors and points.

    The reference block always has ratio 1: scaling all ratios and the base learning rate in opposite directions
    changes nothing, so one ratio must be fixed.

    Args:
        blocks: the blocks whose ratios are searched. The reference is left out if it is among them. Empty: one
            learning rate for all blocks, and only the base learning rate and the warm-up are searched.
        reference: the block with ratio 1.
        base_lr: lowest and highest log2 of the base learning rate.
        warmup: lowest and highest log2 of the warm-up, as a share of the steps.
        ratio: lowest and highest log2 of every ratio.

    Raises:
        ValueError: a lower bound is not below its upper bound, or a block is named twice.

    Example:
        >>> space = Space(["emb", "ffn"])
        >>> space.names, space.vector(Point(2**-9, 0.25, {"emb": 8.0})).tolist()
        (('base_lr', 'warmup', 'emb'), [-9.0, -2.0, 3.0])
    """

    blocks: Sequence[str]
    reference: str = Block.FFN.value
    base_lr: tuple[float, float] = (-16.0, -4.0)
    warmup: tuple[float, float] = (-6.0, -0.5)
    ratio: tuple[float, float] = (-7.0, 7.0)

    def __post_init__(self) -> None:
        blocks = tuple(str(Block(block)) for block in self.blocks if block != self.reference)
        object.__setattr__(self, "blocks", blocks)
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"blocks {', '.join(blocks)} name one twice; expected every block once")
        for name in (*SHARED, "ratio"):
            low, high = getattr(self, name)
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"{name} is searched from {low} to {high}; expected a lower bound first")

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each dimension: "base_lr", "warmup", then the blocks."""
        return (*SHARED, *self.blocks)

    @property
    def low(self) -> Vector:
        """The lower bound of each dimension."""
        return self._bounds(0)

    @property
    def high(self) -> Vector:
        """The upper bound of each dimension."""
        return self._bounds(1)

    def _bounds(self, side: int) -> Vector:
        return np.array([self.base_lr[side], self.warmup[side], *[self.ratio[side]] * len(self.blocks)])

    def vector(self, point: Point) -> Vector:
        """Return the log2 values of a point. It may lie outside the box.

        Raises:
            ValueError: the point has a ratio for a block that the space does not search.
        """
        if unknown := [block for block in point.ratios if block not in (*self.blocks, self.reference)]:
            raise ValueError(
                f"the point has a ratio for {', '.join(unknown)}; this space searches {', '.join(self.names)}"
            )
        if (ratio := point.ratios.get(self.reference, 1.0)) != 1.0:
            raise ValueError(f"the point has ratio {ratio:g} for {self.reference}; its ratio is 1 here")
        values = [point.base_lr, point.warmup, *(point.ratios.get(block, 1.0) for block in self.blocks)]
        return np.asarray(np.log2(np.array(values, dtype=float)))

    def point(self, vector: Iterable[float]) -> Point:
        """Return the point of a vector of log2 values, rounded to four significant digits."""
        values = [float(f"{2.0 ** float(value):.{_DIGITS}g}") for value in vector]
        if len(values) != len(self.names):
            raise ValueError(f"a vector of {len(values)} values; expected {len(self.names)}")
        base_lr, warmup, *ratios = values
        return Point(base_lr, warmup, dict(zip(self.blocks, ratios)))

    def clip(self, vector: Vector) -> Vector:
        """Return the vector moved to the nearest point of the box."""
        return np.clip(vector, self.low, self.high)

    def from_ratios(self, base_lr: float, warmup: float, ratios: Mapping[Any, float]) -> Point:
        """Return the point of given ratios, scaled so that the reference has ratio 1, moved into the box.

        Args:
            base_lr: base learning rate that goes with `ratios`.
            warmup: length of the warm-up, as a share of the steps.
            ratios: ratios by block; blocks that are not named have ratio 1, and blocks outside the space are dropped.
        """
        given = {str(block): float(ratio) for block, ratio in ratios.items()}
        reference = given.get(self.reference, 1.0)
        own = {block: given.get(block, 1.0) / reference for block in self.blocks}
        return self.point(self.clip(self.vector(Point(base_lr * reference, warmup, own))))
