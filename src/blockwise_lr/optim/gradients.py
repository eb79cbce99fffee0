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
from blockwise_lr.distributed import is_sharded, local
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
    by_block = dict(zip(vectors, torch._foreach_norm(list(vectors.values()), norm_type))) if vectors else {}
    total = torch.linalg.vector_norm(stack_scalars(list(by_block.values())), norm_type)
    return GradientNorms(by_parameter, by_block, total)


def mesh_of(tensor: Tensor) -> Any:
    """Return the device mesh of a DTensor, or None for any other tensor."""
    return tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]


def _foreach_norms(gradients: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """Return the norm of each gradient, with one foreach call per device, dtype and mesh."""
    if math.isinf(norm_type):
        shards = [_summed(gradient) for gradient in gradients]
        return [
            _as_sharded(largest, shard, "max") for largest, shard in zip(largest_elements(shards), shards)
        ]
    alike: dict[Any, list[int]] = {}
    for i, gradient in enumerate(gradients):
        alike.setdefault((gradient.device, gradient.dtype, mesh_of(gradient)), []).append(i)
    norms: dict[int, Tensor] = {}
    for places in alike.values():
        norms.update(zip(places, torch._foreach_norm([gradients[i] for i in places], norm_type)))
    return [norms[i] for i in range(len(gradients))]


def largest_elements(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest absolute element of each tensor, or 0 if it is empty. NaN counts as the largest.

    One foreach call serves all tensors of one device and dtype.

    Args:
        tensors: tensors, or DTensors, of which this process's shards are read.
    """
    alike: dict[Any, list[int]] = {}
    shards = [local(tensor) for tensor in tensors]
    for i, shard in enumerate(shards):
        alike.setdefault((shard.device, shard.dtype, not shard.numel()), []).append(i)
    largest: dict[int, Tensor] = {}
    for (device, dtype, empty), places in alike.items():
        if empty:  # foreach refuses empty tensors for this norm
            largest.update(
                zip(places, torch.zeros(len(places), dtype=dtype.to_real(), device=device).unbind())
            )
        else:
            largest.update(zip(places, torch._foreach_norm([shards[i] for i in places], math.inf)))
    return [largest[i] for i in range(len(tensors))]


def nonfinite_tensors(tensors: Sequence[Tensor]) -> list[bool]:
    """Return whether each tensor has NaN or infinite elements. Causes one host sync; collective for DTensors.

    Args:
        tensors: tensors or DTensors. The number of kernels does not grow with their number beyond that of foreach.
    """
    if not tensors:
        return []
    shards = [_summed(tensor) for tensor in tensors]
    flags = stack_scalars(largest_elements(shards)).isfinite().logical_not().float()
    # Sums, because collective maxima may drop NaN.
    own = [_as_sharded(flag, shard, "sum") for flag, shard in zip(flags.unbind(), shards)]
    return [count > 0 for count in stack_scalars(reduce_sharded(own)).tolist()]


def _summed(tensor: Tensor) -> Tensor:
    """Return a DTensor whose partial sums are reduced; any other tensor unchanged."""
    if not is_sharded(tensor) or not any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        return tensor
    from torch.distributed.tensor import Replicate

    complete = [Replicate() if each.is_partial() else each for each in tensor.placements]  # type: ignore[attr-defined]
    return tensor.redistribute(placements=complete)  # type: ignore[attr-defined, no-any-return]


def _as_sharded(scalar: Tensor, tensor: Tensor, reduction: str) -> Tensor:
    """Return a number of this process's shard as a DTensor, whose shards :func:`reduce_sharded` combines.

    Args:
        scalar: the number, of shape ().
        tensor: the tensor that it was computed from. If this is no DTensor, `scalar` is returned.
        reduction: how the numbers of the shards are combined: "max" or "sum".
    """
    if not is_sharded(tensor):
        return scalar
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements: Any = tensor.placements  # type: ignore[attr-defined]
    parts = [Replicate() if placement.is_replicate() else Partial(reduction) for placement in placements]
    return DTensor.from_local(scalar, mesh_of(tensor), parts, run_check=False)


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
