"""The search for the baseline: one learning rate for all blocks, and its warm-up."""

from __future__ import annotations

import numpy as np

from blockwise_lr.tune.ask_tell import Sampler, Trial
from blockwise_lr.tune.space import Vector

_STEPS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0), (0.0, -0.5))
_SAME = 0.1  # log2 units; closer points are the same point


class UniformLadder(Sampler):
    """Steps of a factor of 2 around the best point until it has a worse neighbour on all four sides, then of sqrt 2.

    A step that made the best point is repeated first. In two dimensions and with few runs, this is more reliable than a
    random search, and its result shows whether the best rate and warm-up are bracketed. When all neighbours are known,
    it draws points at random within a factor of sqrt 2.

    Example:
        >>> from blockwise_lr.tune.space import Point, Space
        >>> ladder = UniformLadder(Space([]), start=[Point(0.001, 0.1)])
        >>> ladder.tell(ladder.ask(), 3.0)
        >>> ladder.ask().base_lr
        0.002
    """

    def _propose(self, generator: np.random.Generator) -> Vector:
        known = [*(trial.vector for trial in self.trials), *self.running]
        for step in (*self._last_step(), *_STEPS):
            vector = self.space.clip(self.centre + np.array(step))
            if all(np.abs(vector - other).max() > _SAME for other in known):
                return vector
        return np.asarray(self.centre + generator.uniform(-0.5, 0.5, len(self.space.names)))

    def _last_step(self) -> list[Vector]:
        """Return the step from the best point before to the best point, if it was one of a factor of 2."""
        best: Trial | None = None
        before: Trial | None = None
        for trial in self.trials:
            if best is None or trial.loss < best.loss:
                best, before = trial, best
        if best is None or before is None:
            return []
        step = best.vector - before.vector
        steps = [np.array(each) for each in _STEPS[:4]]
        return [each for each in steps if np.abs(each - step).max() < _SAME]
