"""How far each block's learning rate can move from the best point: a fit of the loss around it.

Near the best point, the loss is modelled as a sum of parabolas, one in the log2 learning rate y_b of each block b:

    loss = c + sum_b ( g_b * (y_b - y_b*) + q_b * (y_b - y_b*)^2 )

y_b is the log2 of ratio times base learning rate, and y_b* that of the best point. For the reference block it is the
log2 of the base learning rate itself. In these coordinates, a change of one ratio moves one block alone.

The fit is a Bayesian linear regression, so it also has an error where trials are few. Trials count the less the higher
their loss is above the best one, because the parabolas hold only near the best point. How much less follows from the
trials: the share of the height that the parabolas miss, and the noise, are those under which the losses are most
probable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockwise_lr.tune.space import Point, Space, Vector

ALLOWED = 0.01
"""The loss in nats that a move within the valley costs."""

_LEAST_NOISE = 5e-4  # nats
_HIGHEST = 0.5  # nats above the best: trials beyond tell nothing about its surroundings
REACH = 2.5
"""Log2 units from the best point within which trials enter the fit, and beyond which it tells nothing."""

_MISFITS = (0.05, 0.1, 0.2, 0.4)  # shares of a trial's height above the best that the parabolas may miss
_NOISES = (1.0, 2.0, 4.0)  # over the noise given, which is from few seeds
_PRIOR_SLOPE = 0.05  # nats for a factor of 2
_PRIOR_CURVATURE = 0.05
_CERTAIN = 2.0  # standard errors


@dataclass(frozen=True)
class Valley:
    """The loss along one block's learning rate, with all other blocks at the best point.

    Args:
        name: the block, or "warmup".
        slope, curvature: g and q of the parabola, in nats per log2 unit and its square.
        covariance: their covariance, as ((var g, cov), (cov, var q)).
        enough: whether the fit had enough trials to claim anything.
    """

    name: str
    slope: float
    curvature: float
    covariance: tuple[tuple[float, float], tuple[float, float]]
    enough: bool = True

    def cost(self, move: float) -> tuple[float, float]:
        """Return the loss of a move by `move` log2 units over that of the best point, and its standard error."""
        weights = np.array([move, move * move])
        variance = float(weights @ np.array(self.covariance) @ weights)
        return self.slope * move + self.curvature * move * move, math.sqrt(max(variance, 0.0))

    @property
    def is_bounded(self) -> bool:
        """Whether the trials show that the loss rises on both sides: the curvature is positive beyond its error."""
        return self.enough and self.curvature > _CERTAIN * math.sqrt(self.covariance[1][1])

    @property
    def moves(self) -> tuple[float, float] | None:
        """The moves, in log2 units, between which the loss is within `ALLOWED` of the parabola's lowest; None: unknown.

        The best point lies inside, except where the fit puts the lowest point farther away.
        """
        if not self.is_bounded:
            return None
        lowest = -self.slope / (2 * self.curvature)
        half = math.sqrt(ALLOWED / self.curvature)
        return lowest - half, lowest + half

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {"slope": self.slope, "curvature": self.curvature, "covariance": self.covariance}


def fit_valleys(
    space: Space, points: Sequence[Point], losses: Sequence[float], best: Point, *, noise: float
) -> dict[str, Valley]:
    """Fit the parabolas to the finished trials.

    Args:
        space: the space that was searched; it names the blocks and the reference.
        points: the points of the trials.
        losses: their losses; trials far from the best point or with an infinite loss are left out.
        best: the point around which to fit.
        noise: standard deviation of a loss between seeds.

    Returns:
        The valley of the reference, of every block and of "warmup".

    Raises:
        ValueError: no trial near the best point has a finite loss.
    """
    names = valley_names(space)
    near = near_trials(space, points, losses, best)
    if not near:
        raise ValueError("no trial near the best point has a finite loss; expected one at least")
    moves, heights = np.stack([move for move, _ in near]), np.array([height for _, height in near])
    features = np.concatenate([np.ones((len(near), 1)), moves, moves**2], axis=1)
    count = len(names)
    prior = np.concatenate([[1.0], np.full(count, _PRIOR_SLOPE), np.full(count, _PRIOR_CURVATURE)]) ** 2
    noises = [max(noise, _LEAST_NOISE) * times for times in _NOISES]
    variances = [each**2 + (share * heights) ** 2 for each in noises for share in _MISFITS]
    variance = max(variances, key=lambda each: _log_evidence(features, heights, prior, each))
    weighted = features / variance[:, None]
    covariance = np.linalg.inv(features.T @ weighted + np.diag(1 / prior))
    solution = covariance @ (weighted.T @ heights)
    valleys = {}
    for i, name in enumerate(names):
        g, q = 1 + i, 1 + count + i
        block = covariance[np.ix_([g, q], [g, q])]
        valleys[name] = Valley(
            name,
            float(solution[g]),
            float(solution[q]),
            ((float(block[0, 0]), float(block[0, 1])), (float(block[1, 0]), float(block[1, 1]))),
            enough=len(near) >= needed_trials(space),
        )
    return valleys


def near_trials(
    space: Space, points: Sequence[Point], losses: Sequence[float], best: Point
) -> list[tuple[Vector, float]]:
    """Return the trials that enter the fit: the move of each from the best point, and its height above the lowest loss.

    Args:
        space, points, losses, best: as in :func:`fit_valleys`.
    """
    centre, lowest = block_vector(space, best), min(losses)
    moves = [(block_vector(space, point) - centre, loss - lowest) for point, loss in zip(points, losses)]
    return [(move, height) for move, height in moves if height <= _HIGHEST and np.abs(move).max() <= REACH]


def needed_trials(space: Space) -> int:
    """Return how many trials near the best point the fit needs: a third more than it has parameters."""
    return math.ceil(4 / 3 * (1 + 2 * len(valley_names(space))))


def _log_evidence(features: Vector, heights: Vector, prior: Vector, variance: Vector) -> float:
    """Return the log probability of the heights under the model, up to a constant."""
    total = (features * prior) @ features.T + np.diag(variance)
    _, determinant = np.linalg.slogdet(total)
    return -0.5 * float(determinant + heights @ np.linalg.solve(total, heights))


def valley_names(space: Space) -> tuple[str, ...]:
    """Return the names of the fitted dimensions: the reference, the warm-up, then the blocks."""
    return (space.reference, "warmup", *space.blocks)


def block_vector(space: Space, point: Point) -> Vector:
    """Return the log2 learning rate of every block, with the warm-up's log2, in the order of `valley_names`."""
    vector = space.vector(point)
    vector[2:] += vector[0]
    return vector


def paired_noise(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the standard deviation of a loss that remains between seeds when two points are compared seed by seed.

    All trials of a search share one seed, so what a seed adds to all of them is no noise.

    Args:
        first, second: the losses of two points for the same seeds. Seeds with an infinite loss are left out.

    Returns:
        None with fewer than two seeds, or if all differences are equal.

    Example:
        >>> round(paired_noise([3.0, 3.5], [2.9, 3.6]), 4)
        0.1
    """
    gaps = [a - b for a, b in zip(first, second) if math.isfinite(a) and math.isfinite(b)]
    if len(gaps) < 2:
        return None
    return float(np.std(gaps, ddof=1)) / math.sqrt(2) or None
