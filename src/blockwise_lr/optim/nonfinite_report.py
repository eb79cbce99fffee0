"""Find and describe non-finite gradients and weights: their blocks, parameters and elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.optim.gradients import (
    GradientNorms,
    Groups,
    ParametersByBlock,
    nonfinite_tensors,
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
    return _nonfinite(parameters_with_gradients(model, blocks), _gradient)


def nonfinite_weights(found: ParametersByBlock) -> dict[Block, list[str]]:
    """Return the parameters that contain NaN or infinite elements, by block. Causes a host sync.

    Args:
        found: parameters by block and name.
    """
    return _nonfinite(found, lambda parameter: parameter.detach())


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # true for the result of parameters_with_gradients
    return parameter.grad


def _nonfinite(found: ParametersByBlock, tensor: Callable[[nn.Parameter], Tensor]) -> dict[Block, list[str]]:
    """Return the parameters for which `tensor` returns one with NaN or infinite elements, by block."""
    names = [(block, name) for block, of in found.items() for name in of]
    flags = nonfinite_tensors([tensor(p) for of in found.values() for p in of.values()])
    result: dict[Block, list[str]] = {}
    for (block, name), flag in zip(names, flags):
        if flag:
            result.setdefault(block, []).append(name)
    return result


def _counts(gradients: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the numbers of NaN and of infinite elements of each gradient. Causes a host sync."""
    counts = [count(each).sum() for count in (torch.isnan, torch.isinf) for each in gradients]
    numbers = stack_scalars(reduce_sharded(counts)).tolist()
    return list(zip(numbers, numbers[len(gradients) :]))


def describe_nonfinite(found: ParametersByBlock, norms: GradientNorms, norm_type: float) -> str:
    """Describe the gradients of the blocks whose norms are not finite, for an error message."""
    names = _nonfinite(found, _gradient)
    shown = [(block, name) for block, of in names.items() for name in of[:_SHOWN]]
    counts = iter(_counts([_gradient(found[block][name]) for block, name in shown]))
    descriptions = []
    for block, of in names.items():
        each = [
            f"{name} ({nan:,} nan, {inf:,} inf of {found[block][name].numel():,})"
            for name, (nan, inf) in zip(of[:_SHOWN], counts)
        ]
        more = f" and {len(of) - _SHOWN} more" if len(of) > _SHOWN else ""
        descriptions.append(f"{block.value}: {', '.join(each)}{more}")
    if not descriptions:
        dtype = str(norms.total.dtype).removeprefix("torch.")
        descriptions = [
            f"{block.value}: every element is finite, but the norm of order {norm_type:g} overflows {dtype}"
            for block in norms.nonfinite()
        ]
    return "; ".join(descriptions)
