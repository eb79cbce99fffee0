"""The gradients of a model by block, and their norms in one pass."""

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
Members = dict[Block, dict[str, nn.Parameter]]
"""Parameters with a gradient, by block and name."""

_WHAT = "a norm by block"  # in messages

# A map is good for as long as the model has the same trainable parameters: split_fused and merge_fused rename them.
_MAPS: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], BlockMap]] = WeakKeyDictionary()


def members(model: nn.Module, blocks: BlockMap | Groups | None) -> Members:
    """The parameters that have a gradient, by block, in the model's order or in that of the groups.

    Raises:
        ValueError: FSDP1; a group without block; a sparse gradient.
    """
    if type(model).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) flattens parameters, so their blocks cannot be told apart: "
            "use torch.distributed.fsdp.fully_shard"
        )
    found: Members = {}
    if blocks is not None and not isinstance(blocks, Mapping):
        for group in blocks:
            if not {"block", "names"} <= group.keys():
                raise ValueError("a parameter group has no block: make them with param_groups(model, lr)")
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    check_gradient(name, parameter.grad, _WHAT)
                    found.setdefault(Block(group["block"]), {})[name] = parameter
        return found
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    blocks = _map(model, tuple(trainable)) if blocks is None else blocks
    for name, parameter in trainable.items():
        if parameter.grad is not None:
            check_gradient(name, parameter.grad, _WHAT)
            found.setdefault(blocks[name], {})[name] = parameter
    return found


def _map(model: nn.Module, names: tuple[str, ...]) -> BlockMap:
    kept = _MAPS.get(model)
    if kept is None or kept[0] != names:
        _MAPS[model] = kept = (names, classify(model))
    return kept[1]


@dataclass(frozen=True)
class GradientNorms:
    """The norms of one gradient, on its device.

    Args:
        by_parameter: of every parameter that has a gradient, by block and name; each of shape ().
        by_block: of every block with such a parameter; each of shape ().
        total: of the whole gradient; of shape ().
    """

    by_parameter: Mapping[Block, Mapping[str, Tensor]]
    by_block: dict[Block, Tensor]
    total: Tensor

    def nonfinite(self) -> dict[Block, list[str]]:
        """The blocks whose norm is not finite, each with its parameters of which that is so; waits for the device.

        A block without such a parameter has finite gradients that are too large to square.
        """
        pairs = [(block, name) for block, of in self.by_parameter.items() for name in of]
        each = [norm for of in self.by_parameter.values() for norm in of.values()]
        finite = together([*self.by_block.values(), *each]).isfinite().tolist()
        found: dict[Block, list[str]] = {b: [] for b, fine in zip(self.by_block, finite) if not fine}
        for (block, name), fine in zip(pairs, finite[len(self.by_block) :]):
            if not fine:
                found[block].append(name)
        return found


def gradient_norms(found: Members, norm_type: float = 2.0) -> GradientNorms:
    """The norms of these parameters' gradients; on sharded ones a collective call, with the norms of the whole.

    Args:
        found: as :func:`members` gives them.
        norm_type: p of the p-norm.
    """
    gradients = [p.grad for of in found.values() for p in of.values() if p.grad is not None]
    each = iter(whole(_foreach_norms(gradients, norm_type)))
    # One vector a block, of which the norms of its parameters are views: that is what a log of many steps keeps.
    vectors = {block: together([next(each) for _ in of]) for block, of in found.items()}
    by_parameter = {block: dict(zip(found[block], vector.unbind())) for block, vector in vectors.items()}
    by_block = {block: torch.linalg.vector_norm(vector, norm_type) for block, vector in vectors.items()}
    total = torch.linalg.vector_norm(together(list(by_block.values())), norm_type)
    return GradientNorms(by_parameter, by_block, total)


def mesh_of(tensor: Tensor) -> Any:
    """The device mesh of a DTensor; None of any other tensor."""
    return tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]


def _foreach_norms(gradients: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """The norm of each; one foreach call for those that one kernel can take together."""
    alike: dict[Any, list[int]] = {}
    for i, gradient in enumerate(gradients):
        alike.setdefault((gradient.device, gradient.dtype, mesh_of(gradient)), []).append(i)
    norms: dict[int, Tensor] = {}
    for places in alike.values():
        if math.isinf(norm_type):  # foreach refuses what has no elements here
            norms.update((i, _largest(gradients[i])) for i in places)
        else:
            norms.update(zip(places, torch._foreach_norm([gradients[i] for i in places], norm_type)))
    return [norms[i] for i in range(len(gradients))]


def _largest(gradient: Tensor) -> Tensor:
    """The largest absolute value, 0 where there is no element; of a DTensor as one, to be put together by `whole`."""
    if not is_sharded(gradient):
        return gradient.abs().amax() if gradient.numel() else gradient.new_zeros(()).abs()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements: Any = gradient.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):  # sums that are still to be made
        norm: Tensor = torch.linalg.vector_norm(gradient, math.inf)
        return norm
    own = _largest(gradient.to_local())  # type: ignore[attr-defined]
    parts = [Replicate() if placement.is_replicate() else Partial("max") for placement in placements]
    return DTensor.from_local(own, mesh_of(gradient), parts, run_check=False)


def whole(scalars: Sequence[Tensor]) -> list[Tensor]:
    """Scalars of shape (), those that processes hold parts of put together: one exchange for all that are alike."""
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


def together(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars as one vector, on the device of the first."""
    if not scalars:
        return torch.zeros(0)
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])
