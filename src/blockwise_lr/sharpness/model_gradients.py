"""MeasuredModel: the model that is measured, and its gradients on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockwise_lr import distributed as processes
from blockwise_lr.distributed import is_sharded, sharded_like
from blockwise_lr.sharpness.gradient_checks import check_gradient
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

    def predict(self, batch: Any, *, needs_gradient: bool = True, check_rows: bool = True) -> Predictions:
        """Return the predictions on a batch, as :func:`predict`.

        If there are several processes, some may have no label that counts.
        """
        return predict(
            self.model,
            batch,
            self.loss_fn,
            needs_gradient=needs_gradient,
            may_be_empty=self.parts.distributed,
            check_rows=check_rows,
        )

    def samples(self, predictions: Predictions) -> int:
        """Return the number of rows that count, over all processes."""
        if not self.parts.distributed:
            return predictions.samples
        return processes.sum_over_ranks(predictions.samples, self.parts.parameters[0].device)

    def row_counts(self, predictions: Predictions) -> Tensor:
        """Return the numbers of :meth:`Predictions.row_counts`, over all processes.

        Returns:
            (3,) float64, on the model's device. The host does not wait for them.
        """
        counts = predictions.row_counts()
        if self.parts.distributed:
            dist.all_reduce(counts)
        return counts

    def sample_range(self, predictions: Predictions) -> tuple[int, int] | None:
        """Return the numbers of samples on lower ranks and on all ranks.

        Returns:
            None on a single process, where only the device knows the number of samples.
        """
        if not self.parts.distributed:
            return None
        return processes.offset_and_total(predictions.samples, self.parts.parameters[0].device)


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


def stream_gradients(
    measured: MeasuredModel,
    loss: Tensor,
    receive: Callable[[Sequence[int], Sequence[Tensor | None]], None],
    *,
    keep_graph: bool = False,
) -> None:
    """Pass on the gradients of :func:`gradients_of_sum` in groups, as the backward pass computes them.

    If `receive` keeps none of them, about a sixteenth of the gradients exist at a time, or the largest one. For a
    sharded model, all of this process's shards do.

    Args:
        measured, loss, keep_graph: as in :func:`gradients_of_sum`.
        receive: takes indices of parameters and their gradients. A gradient may share memory with others.

    Raises:
        ValueError: as in :func:`gradients_of_sum`.
    """
    parts = measured.parts
    if parts.sharded:
        gradients = gradients_of_sum(measured, loss, keep_graph=keep_graph)
        receive(range(len(gradients)), gradients)
        return
    stream = _Stream(parts, receive)
    with ExitStack() as stack:
        for i, parameter in enumerate(parts.parameters):
            hook: Any = parameter.register_hook(partial(stream.arrive, i))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        # Unlike backward(), it leaves .grad alone, and the hooks of DDP and of optimizers that run during backward().
        torch.autograd.grad(loss, parts.parameters, retain_graph=keep_graph, allow_unused=True)
    stream.flush()


class _Stream:
    """Gradients on their way from the backward pass to `receive`."""

    def __init__(
        self, parts: ParameterParts, receive: Callable[[Sequence[int], Sequence[Tensor | None]], None]
    ) -> None:
        self._parts, self._receive = parts, receive
        self._limit = parts.elements_at_a_time
        self._missing = len(parts.parameters)
        self._indices: list[int] = []
        self._gradients: list[Tensor] = []
        self._elements = 0
        self._lock = Lock()  # the backward pass of a model on several GPUs runs in a thread for each

    def arrive(self, i: int, gradient: Tensor) -> Tensor:
        """Take the gradient of a parameter, and return one without memory in its place."""
        check_gradient(self._parts.names[i], gradient, "sharpness")
        with self._lock:
            self._indices.append(i)
            self._gradients.append(gradient)
            self._elements += gradient.numel()
            self._missing -= 1
            if self._elements >= self._limit or not self._missing:
                self.flush()
        return gradient.new_zeros(()).expand(gradient.shape)

    def flush(self) -> None:
        """Pass on the gradients that have arrived."""
        if self._indices:
            self._receive(self._indices, self._gradients)
        self._indices, self._gradients, self._elements = [], [], 0


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
