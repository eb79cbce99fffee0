"""The search for the baseline: one learning rate for all blocks, and its warm-up."""

from __future__ import annotations

import numpy as np

from blockwise_lr.tune.ask_tell import Sampler
from blockwise_lr.tune.space import Vector

_STEPS = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5))
_SAME = 0.1  # log2 units; closer points are the same point


class UniformLadder(Sampler):
    """Steps of a factor of 2 around the best point until it has a worse neighbour on all four sides, then of sqrt 2.

    For two dimensions and few runs, this is more reliable than a random search, and its result shows whether the best
    rate is bracketed. When all neighbours are known, it draws points at random within a factor of sqrt 2.

    Example:
        >>> from blockwise_lr.tune.space import Point, Space
        >>> ladder = UniformLadder(Space([]), start=[Point(0.001, 0.1)])
        >>> ladder.tell(ladder.ask(), 3.0)
        >>> ladder.ask().base_lr
        0.002
    """

    def _propose(self, generator: np.random.Generator) -> Vector:
        known = [*(trial.vector for trial in self.trials), *self.running]
        for step in _STEPS:
            vector = self.space.clip(self.centre + np.array(step))
            if all(np.abs(vector - other).max() > _SAME for other in known):
                return vector
        return np.asarray(self.centre + generator.uniform(-0.5, 0.5, len(self.space.names)))

    @property
    def bracketed(self) -> bool:
        """Whether the best base learning rate has a worse one on both sides among the finished trials."""
        best = self.best
        if best is None:
            return False
        rates = [float(trial.vector[0] - best.vector[0]) for trial in self.trials]
        return min(rates) < -_SAME and max(rates) > _SAME
