"""What is measured, and its gradients, on one process or several."""

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
    """What is measured: a model in eval mode, its parts, and how it computes its loss.

    Args:
        model: unwrapped, in eval mode.
        parts: its parameters in parts.
        loss_fn: as in :func:`predict`.
    """

    model: nn.Module
    parts: ParameterParts
    loss_fn: LossFunction | None = None

    def predict(self, batch: Any, *, needs_gradient: bool = True) -> Predictions:
        """As :func:`predict`; but of several processes some may have no label that counts."""
        return predict(
            self.model,
            batch,
            self.loss_fn,
            needs_gradient=needs_gradient,
            may_be_empty=self.parts.distributed,
        )

    def samples(self, predictions: Predictions) -> int:
        """How many rows count, on all processes together."""
        if not self.parts.distributed:
            return predictions.samples
        return processes.total(predictions.samples, self.parts.parameters[0].device)

    def place(self, predictions: Predictions) -> tuple[int, int, int]:
        """Where this process's samples begin among those of all, how many they are, and how many all are."""
        if not self.parts.distributed:
            return 0, predictions.samples, predictions.samples
        start, everywhere = processes.share(predictions.samples, self.parts.parameters[0].device)
        return start, predictions.samples, everywhere


def gradients_of_sum(
    measured: MeasuredModel, loss: Tensor, *, keep_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of the sum over this process's samples; of sharded parameters, over all processes' samples.

    Raises:
        ValueError: ``backward()`` left none; a sparse gradient; tensor-parallel processes with different batches.
    """
    parameters = measured.parts.parameters
    if not measured.parts.sharded:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True)
        return measured.parts.check_dense(gradients)
    # fully_shard's reduce-scatter runs in backward() only, into .grad, and averages over the processes. So do the sums
    # that transformers' tensor parallelism makes of the gradients of some norms.
    divisor = measured.parts.divisor
    with _set_aside(parameters):
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
def _set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, kept):
            parameter.grad = gradient
