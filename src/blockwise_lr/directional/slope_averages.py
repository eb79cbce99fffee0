"""The average of slopes over batches, with standard errors that account for signal and curvature being correlated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blockwise_lr.directional.slope import Slope

Numbers = npt.NDArray[np.float64]


def average_slopes(
    signals: Numbers,
    curvatures: Numbers,
    noise: Numbers,
    weights: Numbers,
    *,
    lrs: Sequence[float],
    ratios: Sequence[float],
    numels: Sequence[int],
) -> list[Slope]:
    """Return the slopes of k blocks from the draws of several batches.

    Args:
        signals: s of each batch, (batches, k).
        curvatures: C of each batch, (batches, k, k).
        noise: rounding noise in the diagonal of C, (batches, k).
        weights: weight of each batch, (batches,); their sum is 1.
        lrs, ratios, numels: learning rate, ratio and number of elements of each block.
    """
    own = np.asarray(lrs, dtype=float)
    diagonals = np.diagonal(curvatures, axis1=1, axis2=2)
    signal, curvature = weights @ signals, weights @ diagonals
    divisor = np.where(curvature == 0, math.nan, curvature)  # 0: the block does not move the logits
    best = signal / divisor
    # The signals that remain when the other blocks move at their own learning rates.
    remaining = signals - curvatures @ own + diagonals * own
    best_while_others_move = (weights @ remaining) / divisor
    # First-order propagation of errors: lr* = s / c, so batch k changes it by (s_k - lr* c_k) / c.
    signal_error, curvature_error, best_error, best_while_others_move_error = (
        _standard_errors(values, weights)
        for values in (
            signals,
            diagonals,
            (signals - best * diagonals) / divisor,
            (remaining - best_while_others_move * diagonals) / divisor,
        )
    )
    rounding = weights @ noise
    return [
        Slope(
            lr=lrs[i],
            signal=float(signal[i]),
            signal_stderr=float(signal_error[i]),
            curvature=float(curvature[i]),
            curvature_stderr=float(curvature_error[i]),
            best_lr=float(best[i]),
            best_lr_stderr=float(best_error[i]),
            noise=float(rounding[i]),
            numel=numels[i],
            ratio=ratios[i],
            best_lr_beside=float(best_while_others_move[i]),
            best_lr_beside_stderr=float(best_while_others_move_error[i]),
        )
        for i in range(len(own))
    ]


def _standard_errors(values: Numbers, weights: Numbers) -> Numbers:
    """Return the standard errors of weighted means over batches, column by column."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1], math.nan)
    deviations = weights[:, None] * (values - weights @ values)
    errors: Numbers = np.sqrt(n / (n - 1) * np.sum(deviations**2, axis=0))
    return errors
