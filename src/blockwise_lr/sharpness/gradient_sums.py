"""What becomes of gradients that arrive in groups: their sum over micro-batches, or their sums of squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockwise_lr.distributed import local
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.tensor_sums import accumulation_dtype


class SquareSums:
    """The sum of squares of each part. The gradients are not kept.

    Args:
        parts: the parts of the model's parameters.

    Attributes:
        totals: (parts,) float64, of the shards on this process.
    """

    def __init__(self, parts: ParameterParts) -> None:
        self._parts = parts
        self.totals = torch.zeros(len(parts), dtype=torch.float64, device=parts.parameters[0].device)

    def add(self, indices: Sequence[int], gradients: Sequence[Tensor | None]) -> None:
        """Add the squares of the gradients of some parameters."""
        self._parts.add_squares(indices, gradients, self.totals)


class GradientSum:
    """The sum of gradients over micro-batches. Half-precision gradients are added in float32.

    Args:
        parts: the parts of the model's parameters.

    Attributes:
        tensors: for each parameter its sum, as this process's shard if it is sharded. None if no gradient arrived.
    """

    def __init__(self, parts: ParameterParts) -> None:
        self.tensors: list[Tensor | None] = [None] * len(parts.parameters)
        # The first gradient of a parameter may share memory with another's, so it must not be changed.
        self._own = [False] * len(parts.parameters)

    def add(self, indices: Sequence[int], gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of some parameters."""
        alike: dict[
            tuple[torch.device, torch.dtype, torch.dtype, bool], list[tuple[int, Tensor, Tensor]]
        ] = {}
        for i, gradient in zip(indices, gradients):
            if gradient is None:
                continue
            gradient, total = local(gradient), self.tensors[i]
            if total is None:
                self.tensors[i] = gradient
            else:
                key = (total.device, total.dtype, gradient.dtype, self._own[i])
                alike.setdefault(key, []).append((i, total, gradient))
        for (*_, own), group in alike.items():
            places, totals, added = (list(each) for each in zip(*group))
            if not own:
                wide = [torch.empty_like(total, dtype=accumulation_dtype(total)) for total in totals]
                torch._foreach_copy_(wide, totals)
                totals = wide
            torch._foreach_add_(totals, added)
            for i, total in zip(places, totals):
                self.tensors[i], self._own[i] = total, True
