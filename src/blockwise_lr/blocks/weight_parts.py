"""A split weight and its parts: how one is computed from the other, and which weights of a module are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.hooks import RemovableHandle

from blockwise_lr.blocks.layout import Layout

SPLIT_STATE = "_blockwise_split"
"""The key in a module's `__dict__` of its :class:`SplitState`."""


class FusedWeight(nn.Module):
    """The parametrization of a split weight: `weight = cat(parts, dim)`.

    It holds a :class:`~blockwise_lr.blocks.layout.Layout` as names and sizes, and the dimension of the parts.

    Args:
        part_names: the parts in order, e.g. ("q", "k", "v").
        sizes: width of each part along `dim`. They may differ (grouped-query attention).
        dim: 0 for the rows of a Linear or a bias, 1 for the columns of transformers' Conv1D.
        repeats: how often the sequence of parts repeats in the weight. Default: 1.
    """

    def __init__(
        self, part_names: tuple[str, ...], sizes: tuple[int, ...], dim: int, repeats: int = 1
    ) -> None:
        super().__init__()
        self.part_names, self.sizes, self.dim, self.repeats = part_names, sizes, dim, repeats

    @property
    def layout(self) -> Layout:
        """The layout of the weight."""
        return Layout(tuple(zip(self.part_names, self.sizes)), self.repeats)

    def forward(self, *parts: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.fuse(parts)
        # A parameter requires gradients even under no_grad, and torch.matmul chooses its kernel by that. Without this
        # context, evaluation on the strided inputs of nn.MultiheadAttention would differ in the last bits.
        with torch.inference_mode(False), torch.enable_grad():
            return self.fuse(parts)

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the weight in its original layout."""
        if self.repeats == 1:
            return torch.cat(list(parts), dim=self.dim)
        stretches = [torch.unflatten(part, self.dim, (self.repeats, -1)) for part in parts]
        return torch.cat(stretches, dim=self.dim + 1).flatten(self.dim, self.dim + 1)

    def right_inverse(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Return copies of the parts of a weight."""
        # Clone, so that no part has the fused strides, shares the fused storage with another part or keeps it alive.
        return tuple(each.clone(memory_format=torch.contiguous_format) for each in self.split(fused.detach()))

    def split(self, fused: Tensor) -> list[Tensor]:
        """Return the parts of a weight in its original layout. Some share its memory."""
        stretches = torch.unflatten(fused, self.dim, (self.repeats, -1))
        lengths = [size // self.repeats for size in self.sizes]
        parts = torch.split(stretches, lengths, dim=self.dim + 1)
        return [part.flatten(self.dim, self.dim + 1) for part in parts]


class SplitWeight:
    """The weight of a module and its parts, for writes from :mod:`blockwise_lr.blocks.write_through`.

    After `merge_fused` it stands for the merged weight.

    Args:
        module: the module that owns the weight.
        leaf: the attribute name of the weight.
    """

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self.module, self.leaf, self.name = (
            module,
            leaf,
            f"{type_before_parametrizations(module).__name__}.{leaf}",
        )

    @property
    def fused(self) -> FusedWeight:
        """The parametrization that computes the weight."""
        found: FusedWeight = getattr(self.module, "parametrizations")[self.leaf][0]  # noqa: B009
        return found

    def tensors(self) -> list[Tensor]:
        """Return the parts, or the weight alone if it is merged."""
        return parts_of(self.module, self.leaf) if self._is_split else [getattr(self.module, self.leaf)]

    def whole(self) -> Tensor:
        """Return the weight, gathered from all processes if it is sharded."""
        tensors = [gathered(tensor) for tensor in self.tensors()]
        return self.fused.fuse(tensors) if self._is_split else tensors[0]

    def assign(self, value: Tensor) -> None:
        """Copy a whole weight into the parts. Parts take over its dtype and device.

        Raises:
            ValueError: the weight has another shape.
        """
        parts = self.tensors()
        shape = list(parts[0].shape)
        if self._is_split:
            shape[self.fused.dim] = sum(self.fused.sizes)
        if list(value.shape) != shape:
            raise ValueError(
                f"{self.name} has shape {tuple(shape)} and is split; it cannot become one of shape "
                f"{tuple(value.shape)}: call merge_fused(model) first, and split_fused after"
            )
        parts_of_value = self.fused.split(value.detach()) if self._is_split else [value.detach()]
        for part, each in zip(parts, parts_of_value):
            if any_sharded([part]):
                part.copy_(_sharded_as(part, each))
            elif (part.dtype, part.device) == (each.dtype, each.device):
                part.copy_(each)
            else:
                part.data = each.clone(memory_format=torch.contiguous_format)

    def require_grad(self, flag: bool) -> None:
        """Set `requires_grad` of the parts."""
        for part in self.tensors():
            part.requires_grad_(flag)

    @property
    def _is_split(self) -> bool:
        """Whether the weight is still split. A tensor may outlive merge_fused."""
        return parametrize.is_parametrized(self.module, self.leaf)


@dataclass(frozen=True)
class SplitState:
    """What a split module remembers to undo the split.

    Args:
        order: names of all the module's own parameters, in their original order.
        leaves: names of the parameters that are split.
        handles: handles of the state_dict hooks.
    """

    order: tuple[str, ...]
    leaves: tuple[str, ...]
    handles: tuple[RemovableHandle, ...]


def split_state(module: nn.Module) -> SplitState | None:
    """Return the state that :func:`split_module` stored in a module; None if it is not split."""
    state: SplitState | None = module.__dict__.get(SPLIT_STATE)
    return state


def parts_of(module: nn.Module, leaf: str) -> list[Tensor]:
    """Return the parameters that a split weight is computed from."""
    originals: Any = getattr(module, "parametrizations")[leaf]  # noqa: B009 (nn.Module types it as a Tensor)
    return [getattr(originals, f"original{i}") for i in range(originals.ntensors)]


def gathered(part: Tensor) -> Tensor:
    """Return the whole part on every process if it is sharded, otherwise the part itself."""
    whole: Tensor = part.full_tensor() if any_sharded([part]) else part  # type: ignore[attr-defined]
    return whole


def _sharded_as(part: Any, each: Tensor) -> Tensor:
    """Return the first process's `each`, sharded like `part`. Collective."""
    from torch.distributed.tensor import distribute_tensor

    whole = each.to(part.dtype).contiguous()
    return distribute_tensor(whole, part.device_mesh, part.placements)


def any_sharded(tensors: list[Tensor]) -> bool:
    """Return whether any tensor is a DTensor, without importing torch.distributed."""
    return any(hasattr(tensor, "placements") for tensor in tensors)
