"""MeasuredModel: the model that is measured, and its gradients on one process or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockwise_lr import distributed as processes
from blockwise_lr.distributed import is_sharded, sharded_like
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.predictions import LossFunction, Predictions, predict


@dataclass(frozen=True)
class MeasuredModel:
    """The model that is measured, its parameters in parts, and its loss function.

    Args:
        model: the unwrapped model, in eval mode.
        parts: the parts of its parameters.
        loss_fn: as in :func:`predict`. Default: the model computes its loss.
    """

    model: nn.Module
    parts: ParameterParts
    loss_fn: LossFunction | None = None

    def predict(self, batch: Any, *, needs_gradient: bool = True) -> Predictions:
        """Return the predictions on a batch, as :func:`predict`.

        If there are several processes, some may have no label that counts.
        """
        return predict(
            self.model,
            batch,
            self.loss_fn,
            needs_gradient=needs_gradient,
            may_be_empty=self.parts.distributed,
        )

    def samples(self, predictions: Predictions) -> int:
        """Return the number of rows that count, over all processes."""
        if not self.parts.distributed:
            return predictions.samples
        return processes.sum_over_ranks(predictions.samples, self.parts.parameters[0].device)

    def offset_and_counts(self, predictions: Predictions) -> tuple[int, int, int]:
        """Return where this process's samples start in the global batch, how many it has, and how many all have."""
        if not self.parts.distributed:
            return 0, predictions.samples, predictions.samples
        start, everywhere = processes.offset_and_total(predictions.samples, self.parts.parameters[0].device)
        return start, predictions.samples, everywhere


def gradients_of_sum(
    measured: MeasuredModel, loss: Tensor, *, keep_graph: bool = False
) -> list[Tensor | None]:
    """Return the gradients of a loss that is summed over this process's samples.

    For sharded parameters, they are of the sum over all processes' samples.

    Args:
        measured: the model.
        loss: the summed loss.
        keep_graph: keep the graph for another backward pass. Default: False.

    Raises:
        ValueError: ``backward()`` left no gradient; a gradient is sparse; or tensor-parallel processes have different
            batches.
    """
    parameters = measured.parts.parameters
    if not measured.parts.sharded:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True)
        return measured.parts.check_dense(gradients)
    # The reduce-scatter of fully_shard runs only in backward(), writes into .grad, and averages over the processes.
    # transformers' tensor parallelism also sums the gradients of some norms in backward() only.
    divisor = measured.parts.divisor
    with _without_gradients(parameters):
        (loss * divisor).backward()  # type: ignore[no-untyped-call]
        found = [parameter.grad for parameter in parameters]
    if all(gradient is None for gradient in found):
        raise ValueError(
            "backward() of the sharded model left no gradient: fully_shard notices the backward pass by the logits, "
            "so they have to be in what the model's forward pass returns"
        )
    measured.parts.check_replicas(found)
    return [
        None
        if gradient is None
        else sharded_like(parameter, gradient)
        if is_sharded(gradient)
        else gradient / divisor
        for parameter, gradient in zip(parameters, found)
    ]


@contextmanager
def _without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Clear ``.grad`` of the parameters inside the context, and restore it afterwards."""
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, kept):
            parameter.grad = gradient
