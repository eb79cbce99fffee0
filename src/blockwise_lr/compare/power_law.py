"""Fit L(N) = E + A N^-alpha to the losses of models of several sizes.

For a fixed alpha, the law is linear in E and A, and least squares has a closed form. The fit minimises over alpha
alone: first on a grid, then by golden-section search between the neighbours of the best point. Many sets of losses are
fitted at once, as the bootstrap needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

ALPHAS = (0.01, 4.0)
"""The range of alpha."""
_GRID = 160
_ITERATIONS = 60
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class PowerLaws:
    """One power law for each set of losses: L(N) = E + A N^-alpha.

    Args:
        floor: E, the loss of an infinitely large model; at least 0.
        scale: A / N0^alpha, where N0 is `centre`; at least 0. It stays in the range of floats, unlike A.
        alpha: the exponent, within :data:`ALPHAS`.
        centre: N0, the geometric mean of the sizes.
        residuals: the losses minus those of the law, by set and size.
    """

    floor: Array
    scale: Array
    alpha: Array
    centre: float
    residuals: Array

    @property
    def amplitude(self) -> Array:
        """A."""
        with np.errstate(over="ignore"):
            return self.scale * self.centre**self.alpha

    def loss(self, sizes: Any) -> Array:
        """Return the loss of each law at each size; one row a law."""
        relative = np.asarray(sizes, dtype=float) / self.centre
        return self.floor[:, None] + self.scale[:, None] * relative[None, :] ** -self.alpha[:, None]

    def size_for(self, losses: Any) -> Array:
        """Return the number of parameters at which each law has the loss.

        It is infinite if the law never falls that low, and 0 if the law is lower at every size, being flat.

        Args:
            losses: one loss for each law.
        """
        above = np.asarray(losses, dtype=float) - self.floor
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = self.centre * (above / self.scale) ** (-1 / self.alpha)
        return np.where(above > 0, found, np.inf)


def fit_power_laws(sizes: Any, losses: Any) -> PowerLaws:
    """Fit L(N) = E + A N^-alpha by least squares, with E and A at least 0.

    Args:
        sizes: the sizes N, at least three.
        losses: the loss at each size; one set, or one set a row.

    Raises:
        ValueError: there are fewer than three different sizes, or a value is not finite.

    Example:
        >>> law = fit_power_laws([1e5, 1e6, 1e7, 1e8], [3.2, 3.1, 3.05, 3.025])
        >>> round(float(law.floor[0]), 3), round(float(law.alpha[0]), 3)  # halves with every factor of 10
        (3.0, 0.301)
    """
    n, y = np.asarray(sizes, dtype=float), np.atleast_2d(np.asarray(losses, dtype=float))
    if len(np.unique(n)) < 3 or y.shape[1:] != n.shape:
        raise ValueError(
            f"a power law needs one loss for each of at least three sizes; got {n.size} sizes and {y.shape[-1]} losses"
        )
    if not (np.isfinite(n).all() and np.isfinite(y).all() and (n > 0).all()):
        raise ValueError("sizes must be positive, and sizes and losses finite: leave diverged runs out")
    centre = float(np.exp(np.log(n).mean()))
    x = np.log(n / centre)
    low_edge, high_edge = np.log(ALPHAS)
    grid = np.linspace(float(low_edge), float(high_edge), _GRID)
    errors = np.stack([_solve(x, y, np.full(len(y), at))[2] for at in grid], axis=1)
    best = errors.argmin(axis=1)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, _GRID - 1)]
    for _ in range(_ITERATIONS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        nearer = _solve(x, y, left)[2] <= _solve(x, y, right)[2]
        low, high = np.where(nearer, low, left), np.where(nearer, right, high)
    log_alpha = (low + high) / 2
    floor, scale, _ = _solve(x, y, log_alpha)
    laws = PowerLaws(floor, scale, np.exp(log_alpha), centre, np.zeros_like(y))
    return PowerLaws(floor, scale, laws.alpha, centre, y - laws.loss(n))


def _solve(x: Array, y: Array, log_alpha: Array) -> tuple[Array, Array, Array]:
    """Return floor, scale and the sum of squared residuals of each set of losses at its alpha."""
    basis = np.exp(-np.exp(log_alpha)[:, None] * x)
    mean_basis, mean = basis.mean(axis=1), y.mean(axis=1)
    centred = basis - mean_basis[:, None]
    scale = (centred * (y - mean[:, None])).sum(axis=1) / (centred**2).sum(axis=1)
    floor = mean - scale * mean_basis
    # A floor below 0 or a loss that rises with size: the best fit is on the boundary.
    through_zero = (basis * y).sum(axis=1) / (basis**2).sum(axis=1)
    scale = np.where(floor < 0, through_zero, scale)
    floor = np.where(floor < 0, 0.0, floor)
    floor, scale = np.where(scale < 0, mean, floor), np.maximum(scale, 0.0)
    return floor, scale, ((y - floor[:, None] - scale[:, None] * basis) ** 2).sum(axis=1)
