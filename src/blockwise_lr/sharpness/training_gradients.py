"""The `empirical` estimator on gradients that exist already: those of the training step itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blockwise_lr.distributed import sharded_like
from blockwise_lr.sharpness.gradient_sums import SquareSums
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.report import SharpnessReport

METHOD = "squared gradient of the training step"
"""``SharpnessReport.method`` of reports from the gradients of training itself."""


def squared_gradients(parts: ParameterParts) -> npt.NDArray[np.float64]:
    """Return the sum of squares of each part's gradient in ``.grad``. The gradients are unchanged.

    Args:
        parts: the parts of the model's parameters. A parameter without a gradient counts as zero.

    Returns:
        (parts,) float64. The host waits for the device once.

    Raises:
        ValueError: no parameter has a gradient, or one has a sparse gradient.
    """
    gradients = [
        None if parameter.grad is None else sharded_like(parameter, parameter.grad)
        for parameter in parts.parameters
    ]
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "no parameter has a gradient: read them after loss.backward() and before optimizer.zero_grad()"
        )
    sums = SquareSums(parts)
    sums.add(range(len(gradients)), parts.check_dense(gradients))
    return np.array(parts.over_shards(sums.totals).tolist())


def gradient_report(
    parts: ParameterParts,
    squares: npt.NDArray[np.float64],
    *,
    samples: int,
    scale: float = 1.0,
    step: int | None = None,
) -> SharpnessReport:
    r"""Return the empirical sharpness from the gradient of one training step.

        S(b) = B ||g_b||^2 / #(b)          g_b = grad_b / scale

    It is a single draw, so it has no standard error. Its bias is that of
    :func:`blockwise_lr.sharpness.estimators.empirical`, and grows with B.

    Args:
        parts: the parts of the model's parameters.
        squares: from :func:`squared_gradients`.
        samples: B, the number of samples in the mean loss, over all processes and micro-batches.
        scale: the factor between these gradients and those of the mean loss. Default: 1.
        step: number of optimizer steps taken before this gradient. Default: none.
    """
    traces = squares[None] * (samples / scale**2)
    return SharpnessReport.from_draws(
        parts.parts,
        [traces],
        [samples],
        estimator="empirical",
        method=METHOD,
        seed=0,
        step=step,
        histograms=None,
    )
