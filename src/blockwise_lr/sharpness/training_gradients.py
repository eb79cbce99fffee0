"""The `empirical` estimator on gradients that are there already: those of the training step itself."""

from __future__ import annotations

from torch import Tensor

from blockwise_lr.distributed import sharded_like
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.report import SharpnessReport

METHOD = "squared gradient of the training step"
"""``SharpnessReport.method`` of what was read off a training's own gradients."""


def squared_gradients(parts: ParameterParts) -> Tensor:
    """The sum of squares of each part's gradient in ``.grad``, in float64; the gradients stay as they are.

    Args:
        parts: the model's. A parameter without a gradient counts as zero.

    Returns:
        (parts,) float64, on the CPU.

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
    return parts.sums(parts.check_dense(gradients))


def gradient_report(
    parts: ParameterParts, squares: Tensor, *, samples: int, scale: float = 1.0, step: int | None = None
) -> SharpnessReport:
    r"""Empirical sharpness from the gradient of one training step (METHOD section 2).

        S(b) = B ||g_b||^2 / #(b)          g_b = grad_b / scale

    One draw, so no standard error. Its bias is that of :func:`blockwise_lr.sharpness.estimators.empirical`, and grows
    with B.

    Args:
        parts: the model's.
        squares: as :func:`squared_gradients` gives them.
        samples: B, the samples whose mean loss the gradient is of, over all processes and micro-batches.
        scale: the gradients are this many times those of the mean loss.
        step: optimizer steps taken before this gradient.
    """
    traces = (squares * (samples / scale**2)).unsqueeze(0)
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
