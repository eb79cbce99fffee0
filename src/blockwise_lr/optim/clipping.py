"""Gradient clipping by block: each block has its own largest norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.distributed import local
from blockwise_lr.optim.block_values import check_block_values
from blockwise_lr.optim.gradients import (
    GradientNorms,
    Groups,
    ParametersByBlock,
    gradient_norms,
    parameters_with_gradients,
    stack_scalars,
)
from blockwise_lr.optim.nonfinite_report import describe_nonfinite

MaxNorm = float | Mapping[Block, float] | Mapping[str, float]

_EXPECTED = "a number above 0 (inf: measured and not clipped)"


def clip_grad_norm_by_block(
    model: nn.Module,
    max_norm: MaxNorm,
    *,
    blocks: BlockMap | Groups | None = None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> dict[Block, Tensor]:
    r"""Clip the gradient of each block to its own largest norm, in place.

        g_b <- g_b * min(1, max_norm_b / (||g_b|| + 1e-6))                     as torch.nn.utils.clip_grad_norm_ does

    A gradient spike in one block then leaves the updates of the other blocks unchanged. Call this function in place of
    ``clip_grad_norm_``: after ``backward()`` of the last micro-batch and after ``scaler.unscale_(optimizer)``. One
    foreach pass computes the norms and one scales the gradients. Like torch's function, it causes no host sync.

    Args:
        model: the model whose gradients are clipped. Under DDP or ``fully_shard``, call this function on all processes;
            the norms are then those of the whole gradient.
        max_norm: largest norm of each block: one number for all blocks, or a mapping from Block, or its string, to a
            number. Blocks that the mapping does not name are not clipped.
        blocks: the block of each parameter: a BlockMap, or the groups of an optimizer on :func:`param_groups`
            (``optimizer.param_groups``). Default: ``classify(model)``, which runs once for each model.
        norm_type: p of the p-norm; ``inf`` for the largest absolute element. Default 2.
        error_if_nonfinite: raise an error and clip nothing if a norm is not finite; this causes a host sync.
            Default False: the gradient of such a block becomes NaN, as in torch's function.

    Returns:
        The norm of each block before clipping, of shape (). Blocks without a gradient are left out.

    Raises:
        ValueError: a norm is out of range; a block is unknown; `max_norm` names a block that is part of a fused weight
            that is not split; the model uses FSDP1; or a gradient is sparse.
        RuntimeError: a norm is not finite and error_if_nonfinite is True. The message names the blocks and parameters
            and counts their NaN and infinite elements. Nothing is clipped.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> (10 * model["ln_f"](model["wte"](torch.arange(4)))).square().sum().backward()
        >>> norms = clip_grad_norm_by_block(model, {"norm": 1.0})
        >>> bool(norms[Block.NORM] > 1), list(norms)
        (True, [<Block.EMB: 'emb'>, <Block.NORM: 'norm'>])
    """
    check_model(model, "clip_grad_norm_by_block")
    limits = resolve_max_norm(max_norm)
    return clip_parameters(
        parameters_with_gradients(model, blocks), limits, norm_type, error_if_nonfinite
    ).by_block


def resolve_max_norm(max_norm: MaxNorm, name: str = "max_norm") -> dict[Block, float]:
    """Return the largest norm of every block that is clipped.

    Raises:
        ValueError: a norm is out of range, or a block is unknown.
    """
    if isinstance(max_norm, Mapping):
        return check_block_values(max_norm, name, lambda value: value > 0, _EXPECTED)
    if not _is_number(max_norm) or not max_norm > 0:
        raise ValueError(f"{name} is {max_norm!r}; expected {_EXPECTED}, or such numbers by block")
    return dict.fromkeys(Block, float(max_norm))


def _is_number(value: object) -> bool:
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool)


@torch.no_grad()
def clip_parameters(
    found: ParametersByBlock,
    limits: Mapping[Block, float],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> GradientNorms:
    """Clip parameters that are already grouped by block, as :func:`clip_grad_norm_by_block` does."""
    if not _is_number(norm_type) or not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type!r}; expected a number above 0, such as 2 or inf")
    refuse_unsplit(found, limits)
    norms = gradient_norms(found, norm_type)
    if error_if_nonfinite and not bool(stack_scalars(list(norms.by_block.values())).isfinite().all()):
        raise RuntimeError(
            "the gradient is not finite, and nothing was clipped. "
            f"{describe_nonfinite(found, norms, norm_type)}. Leave this step out with optimizer.zero_grad(), or lower "
            "the learning rate of these blocks or warm up for longer; error_if_nonfinite=False clips all the same"
        )
    scale_gradients(found, norms, limits)
    return norms


@torch.no_grad()
def scale_gradients(found: ParametersByBlock, norms: GradientNorms, limits: Mapping[Block, float]) -> None:
    """Scale down the gradients of each block whose norm is above its limit. Blocks without a limit are unchanged.

    The factors stay on the device, so this causes no host sync.
    """
    limited = {block: limits[block] for block in norms.by_block if limits.get(block, math.inf) < math.inf}
    if not limited:
        return
    factors = torch._foreach_add([norms.by_block[block] for block in limited], 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, list(limited.values()))
    torch._foreach_clamp_max_(factors, 1.0)
    for block, factor in zip(limited, factors):
        alike: dict[Any, list[Tensor]] = {}
        for parameter in found[block].values():
            if parameter.grad is not None:
                shard = local(parameter.grad)
                alike.setdefault((shard.device, shard.dtype), []).append(shard)
        for (device, _), these in alike.items():
            torch._foreach_mul_(these, factor if factor.device == device else factor.to(device))


def refuse_unsplit(found: ParametersByBlock, limits: Mapping[Block, float]) -> None:
    """Check that no limit is given only for the parts of a fused QKV weight.

    Raises:
        ValueError: there is such a weight; one parameter cannot have different limits for its parts.
    """
    if Block.QKV in found and Block.QKV not in limits and (Block.QK in limits or Block.VO in limits):
        raise ValueError(
            f"{next(iter(found[Block.QKV]))} is a fused QKV weight, and max_norm names only blocks of its parts: "
            "call split_fused(model) first, before the optimizer is made, or name qkv in max_norm"
        )
