"""Products of the true Hessian along the optimizer's update, by Hessian-vector products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockwise_lr.directional.directional_derivatives import Direction
from blockwise_lr.directional.moved_parameters import MovedParameters
from blockwise_lr.directional.update_signals import dot
from blockwise_lr.sharpness.hessian import NoDoubleBackwardError, double_backward
from blockwise_lr.sharpness.model_gradients import MeasuredModel


def update_hessian(
    measured: MeasuredModel, batch: Any, moved: MovedParameters, directions: Sequence[Direction]
) -> npt.NDArray[np.float64]:
    """Return u_a' H u_b of the summed loss for k directions: (k, k).

    This needs memory for one direction and one product, each as large as the parameters. The model must not be sharded.

    Raises:
        ValueError: the model has no double backward pass.
    """
    parts = measured.parts
    rows = []
    for direction in directions:
        vector = [torch.zeros_like(parameter.detach()) for parameter in parts.parameters]
        for chunk in direction.chunks:
            targets = [chunk.view(vector[i]) for i in chunk.indices]
            torch._foreach_copy_(targets, list(moved.updates.of(chunk).unbind()))
        try:
            products, _ = double_backward(measured, [batch], vector, strict=True)
        except NoDoubleBackwardError as error:
            raise ValueError(f"hessian=True needs a double backward pass: {error}; leave it out") from None
        del vector
        summed = [
            torch.zeros_like(parameter) if product is None else product
            for parameter, product in zip(parts.parameters, parts.sum_over_processes(products))
        ]
        rows.append([_along(each, summed, moved) for each in directions])
    return np.array(rows)


def _along(direction: Direction, tensors: Sequence[Tensor], moved: MovedParameters) -> float:
    """Return the product of the update of one block with the tensors, one for each parameter."""
    return sum(float(dot(chunk.stack(tensors), moved.updates.of(chunk))) for chunk in direction.chunks)
