"""What all samplers share: the start points, the finished trials, and a random generator for each question."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockwise_lr.tune.space import Point, Space, Vector


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Args:
        vector: the log2 values of its point.
        loss: the loss at the end of the run; infinity if the run diverged or was ended early.
        prior: whether the sampler did not choose the point: it is a start point, or from an earlier search.
    """

    vector: Vector
    loss: float
    prior: bool = False


class Sampler(ABC):
    """Proposes points and learns from their losses.

    A proposal depends only on the seed, on the trials told so far, on the points that are still running and on how many
    points were asked for or told. A new sampler that is told the same trials therefore continues like the old one.

    Args:
        space: the space to search.
        start: the points to try first, in this order.
        seed: seed of all random choices.

    Example:
        >>> class Middle(Sampler):
        ...     def _propose(self, generator):
        ...         return (self.space.low + self.space.high) / 2
        >>> sampler = Middle(Space([]), start=[Point(0.001, 0.1)])
        >>> point = sampler.ask()
        >>> sampler.tell(point, 3.2)
        >>> sampler.best.loss, sampler.ask().base_lr
        (3.2, 0.0009766)
    """

    def __init__(self, space: Space, start: Sequence[Point] = (), seed: int = 0) -> None:
        self.space = space
        self._start = list(start)
        self._start_points = tuple(start)
        for point in self._start:
            space.vector(point)  # raises an error for a point of another space
        self._seed = seed
        self._asked = 0
        self._pending: list[Point] = []
        self.trials: list[Trial] = []

    def ask(self) -> Point:
        """Return the next point to try: a start point as long as there are any."""
        number, self._asked = self._asked, self._asked + 1
        if self._start:
            point = self._start.pop(0)
        else:
            generator = np.random.default_rng([self._seed, number])
            point = self.space.point(self.space.clip(self._propose(generator)))
        self._pending.append(point)
        return point

    def restore(self, point: Point) -> None:
        """Record a point as running, as if `ask` had returned it: a trial that an interrupted search had started."""
        self._asked += 1
        if point in self._start:
            self._start.remove(point)
        self._pending.append(point)

    def tell(self, point: Point, loss: float, *, prior: bool = False) -> None:
        """Record a finished trial. Its point need not come from `ask`, so that a search can be resumed.

        Args:
            point: the point that was tried.
            loss: its loss; infinity if the run diverged or was ended early.
            prior: the trial is from an earlier search. It informs the proposals, but is not one of them.

        Raises:
            ValueError: the loss is not a number.
        """
        if math.isnan(loss):
            raise ValueError("the loss of a trial is not a number; expected infinity for a run that diverged")
        vector = self.space.vector(point)
        if point not in self._pending and not prior:
            self.restore(point)
        if point in self._pending:
            self._pending.remove(point)
        self.trials.append(Trial(vector, loss, prior or point in self._start_points))

    @property
    def best(self) -> Trial | None:
        """The trial with the lowest loss, the earlier one in a tie; None if no run has finished without diverging."""
        finite = [trial for trial in self.trials if math.isfinite(trial.loss)]
        return min(finite, key=lambda trial: trial.loss, default=None)

    @property
    def proposed(self) -> list[Trial]:
        """The trials whose points this sampler chose, in the order of their ends."""
        return [trial for trial in self.trials if not trial.prior]

    @property
    def running(self) -> list[Vector]:
        """The points that were asked for and not told yet."""
        return [self.space.vector(point) for point in self._pending]

    @property
    def centre(self) -> Vector:
        """The best point so far; without one, a point that is running, or the middle of the box."""
        if (best := self.best) is not None:
            return best.vector
        return self.running[0] if self._pending else (self.space.low + self.space.high) / 2

    @abstractmethod
    def _propose(self, generator: np.random.Generator) -> Vector:
        """Return the log2 values of the next point, from the trials so far. They may lie outside the box."""
