"""The gradients of a model grouped by block, and their norms in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap, classify
from blockwise_lr.distributed import is_sharded
from blockwise_lr.sharpness.gradient_checks import check_gradient

Groups = Sequence[Mapping[str, Any]]
ParametersByBlock = dict[Block, dict[str, nn.Parameter]]
"""Parameters by block and name."""

_CALLER = "a norm by block"  # the operation that error messages name

# A cached map is valid while the model has the same trainable parameters; split_fused and merge_fused rename them.
_BLOCK_MAPS: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], BlockMap]] = WeakKeyDictionary()


def parameters_with_gradients(model: nn.Module, blocks: BlockMap | Groups | None) -> ParametersByBlock:
    """Return the parameters that have a gradient, by block and name.

    The order is that of the model, or that of the groups if `blocks` are groups.

    Args:
        model: the model.
        blocks: a BlockMap, or groups of :func:`blockwise_lr.param_groups`. None: ``classify(model)``, which is cached.

    Raises:
        ValueError: the model uses FSDP1, a group has no block, or a gradient is sparse.
    """
    if type(model).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) flattens parameters, so their blocks cannot be told apart: "
            "use torch.distributed.fsdp.fully_shard"
        )
    found: ParametersByBlock = {}
    if blocks is not None and not isinstance(blocks, Mapping):
        for group in blocks:
            if not {"block", "names"} <= group.keys():
                raise ValueError("a parameter group has no block: make them with param_groups(model, lr)")
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    check_gradient(name, parameter.grad, _CALLER)
                    found.setdefault(Block(group["block"]), {})[name] = parameter
        return found
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    blocks = _cached_blocks(model, tuple(trainable)) if blocks is None else blocks
    for name, parameter in trainable.items():
        if parameter.grad is not None:
            check_gradient(name, parameter.grad, _CALLER)
            found.setdefault(blocks[name], {})[name] = parameter
    return found


def _cached_blocks(model: nn.Module, names: tuple[str, ...]) -> BlockMap:
    """Return ``classify(model)``, computed again only if the names of the trainable parameters have changed."""
    kept = _BLOCK_MAPS.get(model)
    if kept is None or kept[0] != names:
        _BLOCK_MAPS[model] = kept = (names, classify(model))
    return kept[1]


@dataclass(frozen=True)
class GradientNorms:
    """The norms of one gradient, as tensors of shape () on its device.

    Args:
        by_parameter: norm of each parameter that has a gradient, by block and name.
        by_block: norm of each block that has such a parameter.
        total: norm of the whole gradient.
    """

    by_parameter: Mapping[Block, Mapping[str, Tensor]]
    by_block: dict[Block, Tensor]
    total: Tensor

    def nonfinite(self) -> dict[Block, list[str]]:
        """Return each block whose norm is not finite, with its parameters whose norms are not finite.

        Causes a host sync.

        A block with an empty list has finite gradients whose squares overflow when they are summed over its parameters.
        """
        pairs = [(block, name) for block, of in self.by_parameter.items() for name in of]
        each = [norm for of in self.by_parameter.values() for norm in of.values()]
        finite = stack_scalars([*self.by_block.values(), *each]).isfinite().tolist()
        found: dict[Block, list[str]] = {b: [] for b, fine in zip(self.by_block, finite) if not fine}
        for (block, name), fine in zip(pairs, finite[len(self.by_block) :]):
            if not fine:
                found[block].append(name)
        return found


def gradient_norms(found: ParametersByBlock, norm_type: float = 2.0) -> GradientNorms:
    """Return the norms of the gradients of these parameters.

    For sharded parameters this is a collective call, and the norms are those of the whole gradients.

    Args:
        found: from :func:`parameters_with_gradients`.
        norm_type: p of the p-norm.
    """
    gradients = [p.grad for of in found.values() for p in of.values() if p.grad is not None]
    each = iter(reduce_sharded(_foreach_norms(gradients, norm_type)))
    # The norms of a block's parameters are views of one vector, so a log of many steps keeps one tensor per block.
    vectors = {block: stack_scalars([next(each) for _ in of]) for block, of in found.items()}
    by_parameter = {block: dict(zip(found[block], vector.unbind())) for block, vector in vectors.items()}
    by_block = {block: torch.linalg.vector_norm(vector, norm_type) for block, vector in vectors.items()}
    total = torch.linalg.vector_norm(stack_scalars(list(by_block.values())), norm_type)
    return GradientNorms(by_parameter, by_block, total)


def mesh_of(tensor: Tensor) -> Any:
    """Return the device mesh of a DTensor, or None for any other tensor."""
    return tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]


def _foreach_norms(gradients: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """Return the norm of each gradient, with one foreach call per device, dtype and mesh."""
    alike: dict[Any, list[int]] = {}
    for i, gradient in enumerate(gradients):
        alike.setdefault((gradient.device, gradient.dtype, mesh_of(gradient)), []).append(i)
    norms: dict[int, Tensor] = {}
    for places in alike.values():
        if math.isinf(norm_type):  # foreach refuses empty tensors for this norm
            norms.update((i, _largest(gradients[i])) for i in places)
        else:
            norms.update(zip(places, torch._foreach_norm([gradients[i] for i in places], norm_type)))
    return [norms[i] for i in range(len(gradients))]


def _largest(gradient: Tensor) -> Tensor:
    """Return the largest absolute element, or 0 if the tensor is empty.

    The result for a DTensor is a DTensor, whose shards :func:`reduce_sharded` combines.
    """
    if not is_sharded(gradient):
        return gradient.abs().amax() if gradient.numel() else gradient.new_zeros(()).abs()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements: Any = gradient.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        # These are partial sums, which have to be reduced before the absolute values are taken.
        norm: Tensor = torch.linalg.vector_norm(gradient, math.inf)
        return norm
    own = _largest(gradient.to_local())  # type: ignore[attr-defined]
    parts = [Replicate() if placement.is_replicate() else Partial("max") for placement in placements]
    return DTensor.from_local(own, mesh_of(gradient), parts, run_check=False)


def reduce_sharded(scalars: Sequence[Tensor]) -> list[Tensor]:
    """Return the scalars with the values of all shards combined.

    Args:
        scalars: tensors of shape (). DTensors with the same mesh, placements and dtype are combined in one collective
            call.
    """
    complete = dict(enumerate(scalars))
    alike: dict[Any, list[int]] = {}
    for i, scalar in enumerate(scalars):
        if is_sharded(scalar):
            alike.setdefault((mesh_of(scalar), scalar.placements, scalar.dtype), []).append(i)  # type: ignore[attr-defined]
    for (mesh, placements, _), places in alike.items():
        from torch.distributed.tensor import DTensor

        shares = torch.stack([scalars[i].to_local() for i in places])  # type: ignore[attr-defined]
        sums = DTensor.from_local(shares, mesh, placements, run_check=False).full_tensor()
        complete.update(zip(places, sums.unbind()))
    return [complete[i] for i in range(len(scalars))]


def stack_scalars(scalars: Sequence[Tensor]) -> Tensor:
    """Return the scalars as one vector on the device of the first."""
    if not scalars:
        return torch.zeros(0)
    device = scalars[0].device
    return torch.stack([each if each.device == device else each.to(device) for each in scalars])
