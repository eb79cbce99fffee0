"""Trust-region random search: sample around the best point, within a radius that follows the successes.

Complete(d)P (arXiv 2512.22382) searched learning rates of single modules this way. The losses of neighbouring runs
differ by noise, and a search over the whole box would spend most of its runs where training diverges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockwise_lr.tune.ask_tell import Sampler
from blockwise_lr.tune.space import SHARED, Point, Space, Vector


class TrustRegion(Sampler):
    """Random search in a box around the best point so far.

    Each trial after the start points changes the radius. A trial that becomes the best one is a success: the radius
    grows. After `patience` trials without success, it shrinks.

    Args:
        space: the space to search.
        start: the points to try first. They do not change the radius.
        seed: seed of all random choices.
        radius: first radius of the ratios, in log2 units. Base learning rate and warm-up use half of it.
        smallest, largest: bounds of the radius.
        grow: factor of the radius after a success.
        shrink: factor of the radius after `patience` trials without success.
        patience: trials without success before the radius shrinks.
        moved: mean number of dimensions that a proposal changes; at least one is changed.

    Example:
        >>> search = TrustRegion(Space(["emb"]), start=[Point(0.001, 0.1)])
        >>> search.tell(search.ask(), 3.0)
        >>> point = search.ask()
        >>> 0.5 <= point.ratios["emb"] <= 2
        True
    """

    def __init__(
        self,
        space: Space,
        start: Sequence[Point] = (),
        seed: int = 0,
        *,
        radius: float = 1.0,
        smallest: float = 0.25,
        largest: float = 2.0,
        grow: float = 1.4,
        shrink: float = 0.7,
        patience: int = 4,
        moved: float = 4.0,
    ) -> None:
        super().__init__(space, start, seed)
        self._radius, self._smallest, self._largest = radius, smallest, largest
        self._grow, self._shrink, self._patience = grow, shrink, patience
        self._moved = moved
        self._scale = np.array([0.5 if name in SHARED else 1.0 for name in space.names])

    @property
    def radius(self) -> float:
        """The present radius of the ratios, in log2 units."""
        best = min((trial.loss for trial in self.trials if trial.prior), default=float("inf"))
        radius, failures = self._radius, 0
        for trial in self.proposed:
            if trial.loss < best:
                best, failures, radius = trial.loss, 0, radius * self._grow
            else:
                failures += 1
                if failures == self._patience:
                    failures, radius = 0, radius * self._shrink
            radius = min(max(radius, self._smallest), self._largest)
        return radius

    def _propose(self, generator: np.random.Generator) -> Vector:
        dimensions = len(self.space.names)
        chosen = generator.random(dimensions) < min(1.0, self._moved / dimensions)
        chosen[generator.integers(dimensions)] = True
        step = generator.uniform(-1.0, 1.0, dimensions) * self._scale * self.radius
        return np.asarray(self.centre + np.where(chosen, step, 0.0))
