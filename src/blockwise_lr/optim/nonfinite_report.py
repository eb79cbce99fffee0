"""Find and describe non-finite gradients and weights: their blocks, parameters and elements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.optim.gradients import (
    GradientNorms,
    Groups,
    ParametersByBlock,
    parameters_with_gradients,
    reduce_sharded,
    stack_scalars,
)

_SHOWN = 3  # number of parameters per block that a message names


def nonfinite_gradients(model: nn.Module, blocks: BlockMap | Groups | None = None) -> dict[Block, list[str]]:
    """Return the parameters whose gradients contain NaN or infinite elements, by block. Causes a host sync.

    Args:
        model: the model.
        blocks: as in :func:`clip_grad_norm_by_block`.

    Returns:
        Parameter names by block. Blocks without such a parameter are left out.

    Raises:
        ValueError: the model uses FSDP1, a group has no block, or a gradient is sparse.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> (model["wte"](torch.arange(4)) * torch.inf).sum().backward()
        >>> nonfinite_gradients(model)
        {<Block.EMB: 'emb'>: ['wte.weight']}
    """
    counts = _count_nonfinite(parameters_with_gradients(model, blocks))
    return {block: list(of) for block, of in counts.items()}


def nonfinite_weights(found: ParametersByBlock) -> dict[Block, list[str]]:
    """Return the parameters that contain NaN or infinite elements, by block. Causes a host sync.

    Args:
        found: parameters by block and name.
    """
    counts = _count_nonfinite(found, lambda parameter: parameter.detach())
    return {block: list(of) for block, of in counts.items()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # true for the result of parameters_with_gradients
    return parameter.grad


def _count_nonfinite(
    found: ParametersByBlock, tensor: Callable[[nn.Parameter], Tensor] = _gradient
) -> dict[Block, dict[str, tuple[int, int]]]:
    """Count the NaN and the infinite elements of each parameter that has any.

    Args:
        found: parameters by block and name.
        tensor: returns the tensor of a parameter in which to count. Default: its gradient.
    """
    names = [(block, name) for block, of in found.items() for name in of]
    tensors = [tensor(p) for of in found.values() for p in of.values()]
    counts = [count(each).sum() for count in (torch.isnan, torch.isinf) for each in tensors]
    numbers = stack_scalars(reduce_sharded(counts)).tolist()
    result: dict[Block, dict[str, tuple[int, int]]] = {}
    for (block, name), nan, inf in zip(names, numbers, numbers[len(names) :]):
        if nan or inf:
            result.setdefault(block, {})[name] = (nan, inf)
    return result


def describe_nonfinite(found: ParametersByBlock, norms: GradientNorms, norm_type: float) -> str:
    """Describe the gradients of the blocks whose norms are not finite, for an error message."""
    descriptions = []
    for block, of in _count_nonfinite(found).items():
        shown = [
            f"{name} ({nan:,} nan, {inf:,} inf of {found[block][name].numel():,})"
            for name, (nan, inf) in list(of.items())[:_SHOWN]
        ]
        more = f" and {len(of) - _SHOWN} more" if len(of) > _SHOWN else ""
        descriptions.append(f"{block.value}: {', '.join(shown)}{more}")
    if not descriptions:
        dtype = str(norms.total.dtype).removeprefix("torch.")
        descriptions = [
            f"{block.value}: every element is finite, but the norm of order {norm_type:g} overflows {dtype}"
            for block in norms.nonfinite()
        ]
    return "; ".join(descriptions)
