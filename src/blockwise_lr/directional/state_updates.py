"""The last update of an Adam-like optimizer, computed from its state chunk by chunk."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr.directional.parameter_chunks import Chunk, stacked
from blockwise_lr.distributed import local
from blockwise_lr.fp32 import HALF
from blockwise_lr.optimizers.adam_mini import AdamMini
from blockwise_lr.optimizers.adam_mini_sharded import is_whole, local_second


class StateUpdates:
    r"""The last update of an Adam-like optimizer per unit of learning rate, computed from its state.

        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)         theta <- theta - lr (u + decay theta)

    Decoupled weight decay (AdamW) is not part of the update. The state is read and not changed. The update of a chunk
    exists only while it is used. Nothing waits for the device, even if the optimizer counts its steps there.

    Args:
        optimizer: torch.optim's Adam or AdamW, or AdamMini. Subclasses may step differently, so they are not read.
        parameters: parameters of the model, all of which have been stepped.
        groups: the group of each parameter in the optimizer.

    Attributes:
        kinds: parameters of different kinds must not share a chunk, because their settings differ.

    Raises:
        ValueError: a parameter has no state yet.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], groups: Sequence[dict[str, Any]]
    ) -> None:
        self._parameters, self._groups = parameters, groups
        self._partitions = _partitions(optimizer, parameters)
        self._firsts: list[Tensor] = []
        self._seconds: list[Tensor] = []  # one number for each piece of AdamMini, otherwise for each element
        kinds: list[Hashable] = []
        steps: list[Tensor] = []
        for number, (parameter, group) in enumerate(zip(parameters, groups)):
            state = optimizer.state.get(parameter, {})
            if "exp_avg" not in state:
                raise ValueError(
                    f"{type(optimizer).__name__} has no state for the model's parameter number {number} of shape "
                    f"{tuple(parameter.shape)}: its update is known after a step only; train first, or freeze "
                    "the parameter (requires_grad_(False)) if the loss gives it no gradient"
                )
            second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
            self._firsts.append(local(state["exp_avg"]))
            self._seconds.append(local(second))
            kinds.append((id(group), self._seconds[-1].shape))
            steps.append(torch.as_tensor(state["step"]))
        self.kinds: Sequence[Hashable] = kinds
        self._corrections = _bias_corrections(steps, [group["betas"] for group in groups], self._firsts)

    def of(self, chunk: Chunk) -> Tensor:
        """Return the update of a chunk, in at least float32: (number of parameters, *shape of a slice)."""
        first = wide(chunk.stack(self._firsts))
        correction1, correction2 = (
            stacked([self._corrections[i][moment] for i in chunk.indices]).view(-1, *[1] * (first.ndim - 1))
            for moment in (0, 1)
        )
        eps = self._groups[chunk.indices[0]]["eps"]
        size = (wide(self._second(chunk)) / correction2).sqrt_().add_(eps)
        return (first / correction1).div_(size)

    def _second(self, chunk: Chunk) -> Tensor:
        """Return the second moments of a chunk, in a shape that broadcasts to the chunk's."""
        parameter, partition = self._parameters[chunk.indices[0]], self._partitions[chunk.indices[0]]
        if partition is None:
            return chunk.stack(self._seconds)
        if chunk.part is None and is_whole(parameter, partition):
            pieces = stacked([self._seconds[i] for i in chunk.indices])
            return _spread_rows(pieces, local(parameter.detach()).shape, chunk.rows)
        seconds = [local_second(self._seconds[i], self._parameters[i], partition) for i in chunk.indices]
        return stacked([chunk.view(second) for second in seconds])


def _partitions(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Sequence[int]] | list[None]:
    """Return the number of pieces along each dimension of each parameter; None if the optimizer has no pieces."""
    if not isinstance(optimizer, AdamMini):
        return [None] * len(parameters)
    groups = optimizer.param_groups
    known = {id(p): pieces for group in groups for p, pieces in zip(group["params"], group["partitions"])}
    return [known[id(parameter)] for parameter in parameters]


def _bias_corrections(
    steps: Sequence[Tensor], betas: Sequence[tuple[float, float]], firsts: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Return (1 - beta1^t, 1 - beta2^t) of each parameter, in the device and the dtype of its update.

    The steps may be counted on the device. The device is not waited for: its copies from the host are asynchronous.
    """
    found: list[tuple[Tensor, ...]] = [()] * len(steps)
    alike: dict[Hashable, list[int]] = {}
    for i, (step, first) in enumerate(zip(steps, firsts)):
        alike.setdefault((step.device, first.device, first.dtype), []).append(i)
    for indices in alike.values():
        first = firsts[indices[0]]
        t = _on_device_of(first, torch.stack([steps[i] for i in indices]))
        corrections = []
        for moment in (0, 1):
            beta = torch.tensor([betas[i][moment] for i in indices], dtype=torch.float64)
            correction = 1 - _on_device_of(first, beta).pow_(t)
            corrections.append(correction.to(_wide_dtype(first)).unbind())
        for i, *both in zip(indices, *corrections):
            found[i] = tuple(both)
    return found


def _on_device_of(other: Tensor, values: Tensor) -> Tensor:
    """Return a float64 copy of the values on the device of another tensor, without waiting for the device."""
    return torch.empty(values.shape, dtype=torch.float64, device=other.device).copy_(
        values, non_blocking=True
    )


def _spread_rows(second: Tensor, shape: Sequence[int], rows: tuple[int, int] | None) -> Tensor:
    """Return the second moments of some rows of a parameter, in a shape that broadcasts to these rows.

    Args:
        second: one number for each piece: (number of parameters, number of pieces along each dimension).
        shape: shape of one parameter.
        rows: start and length along its first dimension; None: all rows.
    """
    for dim, size in enumerate(shape):
        pieces = second.shape[dim + 1]
        if pieces == 1:
            continue
        start, length = rows if rows is not None and dim == 0 else (0, size)
        width = size // pieces
        first, last = start // width, -(-(start + length) // width)
        second = second.narrow(dim + 1, first, last - first)
        if width > 1:
            second = second.repeat_interleave(width, dim + 1).narrow(dim + 1, start - first * width, length)
    return second


def wide(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, and any other tensor unchanged."""
    return tensor.to(_wide_dtype(tensor))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in HALF else tensor.dtype
