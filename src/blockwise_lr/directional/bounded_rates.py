"""The learning rates that minimise a quadratic model of the loss within bounds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

_SWEEPS, _TOLERANCE = 10_000, 1e-13


def bounded_minimum(matrix: npt.ArrayLike, signal: npt.ArrayLike, low: float, high: float) -> Numbers:
    """Return the l within [low, high] that minimises ``l' A l / 2 - s' l``.

    Each sweep minimises over one entry after another, with the others fixed. For a positive definite A the sweeps
    converge to the only minimum.

    Args:
        matrix: A, symmetric positive definite, (k, k).
        signal: s, (k,).
        low, high: bounds of every entry; 0 < low <= high.

    Raises:
        ValueError: an entry of the diagonal of A is not above 0, or a number is not finite.
    """
    a, s = np.asarray(matrix, dtype=float), np.asarray(signal, dtype=float)
    diagonal = np.diagonal(a)
    if not (np.isfinite(a).all() and np.isfinite(s).all() and (diagonal > 0).all()):
        raise ValueError(
            "the quadratic model has a curvature that is not above 0, or a number that is not finite: "
            "measure more batches"
        )
    found: Numbers = np.clip(s / diagonal, low, high)
    for _ in range(_SWEEPS):
        before = found.copy()
        for i in range(len(s)):
            rest = s[i] - a[i] @ found + diagonal[i] * found[i]
            found[i] = min(max(rest / diagonal[i], low), high)
        if np.max(np.abs(found - before) / found) < _TOLERANCE:
            break
    return found


def log_errors(
    matrix: npt.ArrayLike, minimum: Numbers, errors: npt.ArrayLike, low: float, high: float
) -> Numbers:
    """Return how each entry of log(minimum) changes with the noise of each signal, (k, k).

    Row b holds d log(l_b) / d s_j times the standard error of s_j. An entry at a bound does not change.

    Args:
        matrix: A of :func:`bounded_minimum`.
        minimum: its result.
        errors: standard error of each signal, (k,).
        low, high: the bounds.
    """
    a, noise = np.asarray(matrix, dtype=float), np.asarray(errors, dtype=float)
    free = (minimum > low * (1 + 1e-9)) & (minimum < high * (1 - 1e-9))
    found = np.zeros((len(minimum), len(minimum)))
    if free.any():
        inverse = np.linalg.inv(a[np.ix_(free, free)])
        found[np.ix_(free, free)] = inverse * noise[free] / minimum[free, None]
    return found
