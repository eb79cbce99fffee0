"""Gradient clipping by block: every block to a norm of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.optim.block_values import check_block_values
from blockwise_lr.optim.gradients import (
    GradientNorms,
    Groups,
    ParametersByBlock,
    gradient_norms,
    mesh_of,
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
    r"""Scale the gradient of every block down to a norm of its own, in place.

        g_b <- g_b * min(1, max_norm_b / (||g_b|| + 1e-6))                     as torch.nn.utils.clip_grad_norm_ does

    So a burst in one block leaves the updates of the others as they are. Call it where ``clip_grad_norm_`` would be:
    after ``backward()`` of the last micro-batch (and ``scaler.unscale_(optimizer)``), instead of it. One foreach pass
    over the gradients measures and one scales; like torch's it does not wait for the device.

    Args:
        model: the model whose gradients are clipped; under DDP or ``fully_shard`` on all processes at once, whose norms
            are then those of the whole gradient.
        max_norm: largest norm of each block: one number for all, or numbers by Block or its string, where a block that
            is not named is not clipped.
        blocks: which parameter is in which block: a BlockMap, or the groups of an optimizer that :func:`param_groups`
            made (``optimizer.param_groups``). Default: ``classify(model)``, once for each model.
        norm_type: p of the p-norm; ``inf`` for the largest element. Default 2.
        error_if_nonfinite: raise instead of clipping where a norm is not finite, which waits for the device. Default:
            False; the gradient of such a block becomes NaN, as torch's function makes it.

    Returns:
        The norms before clipping, by block, each of shape (); blocks without a gradient are left out.

    Raises:
        ValueError: a norm out of range, an unknown block, one named for a part of a fused weight that was not split, or
            FSDP1, or a sparse gradient.
        RuntimeError: with error_if_nonfinite; names blocks and parameters and says what is in them. Nothing was
            clipped then.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> (10 * model["ln_f"](model["wte"](torch.arange(4)))).square().sum().backward()
        >>> norms = clip_grad_norm_by_block(model, {"norm": 1.0})
        >>> bool(norms[Block.NORM] > 1), list(norms)
        (True, [<Block.EMB: 'emb'>, <Block.NORM: 'norm'>])
    """
    check_model(model, "clip_grad_norm_by_block")
    limits = resolve_max_norm(max_norm)
    return clip_members(
        parameters_with_gradients(model, blocks), limits, norm_type, error_if_nonfinite
    ).by_block


def resolve_max_norm(max_norm: MaxNorm, name: str = "max_norm") -> dict[Block, float]:
    """The largest norm of every block that is clipped. Raises ValueError as :func:`clip_grad_norm_by_block`."""
    if isinstance(max_norm, Mapping):
        return check_block_values(max_norm, name, lambda value: value > 0, _EXPECTED)
    if isinstance(max_norm, (bool, str)) or not max_norm > 0:
        raise ValueError(f"{name} is {max_norm!r}; expected {_EXPECTED}, or such numbers by block")
    return dict.fromkeys(Block, float(max_norm))


@torch.no_grad()
def clip_members(
    found: ParametersByBlock,
    limits: Mapping[Block, float],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> GradientNorms:
    """What :func:`clip_grad_norm_by_block` does, on parameters that were looked up."""
    if isinstance(norm_type, bool) or not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type!r}; expected a number above 0, such as 2 or inf")
    refuse_unsplit(found, limits)
    norms = gradient_norms(found, norm_type)
    if error_if_nonfinite and not bool(stack_scalars(list(norms.by_block.values())).isfinite().all()):
        raise RuntimeError(
            "the gradient is not finite, and nothing was clipped. "
            f"{describe_nonfinite(found, norms, norm_type)}. Leave this step out with optimizer.zero_grad(), or lower "
            "the learning rate of these blocks or warm up for longer; error_if_nonfinite=False clips all the same"
        )
    scale_members(found, norms, limits)
    return norms


def scale_members(found: ParametersByBlock, norms: GradientNorms, limits: Mapping[Block, float]) -> None:
    """Scale the gradients of every block in `limits` whose norm is above its own down to it."""
    for block, norm in norms.by_block.items():
        limit = limits.get(block, math.inf)
        if limit < math.inf:
            alike: dict[Any, list[nn.Parameter]] = {}
            for parameter in found[block].values():
                alike.setdefault(mesh_of(parameter), []).append(parameter)
            for these in alike.values():  # one foreach call cannot take sharded tensors and others
                nn.utils.clip_grads_with_norm_(these, limit, norm)


def refuse_unsplit(found: ParametersByBlock, limits: Mapping[Block, float]) -> None:
    """Raises ValueError: a fused QKV weight, where only blocks of its parts have a limit."""
    if Block.QKV in found and Block.QKV not in limits and (Block.QK in limits or Block.VO in limits):
        raise ValueError(
            f"{next(iter(found[Block.QKV]))} is a fused QKV weight, and max_norm names only blocks of its parts: "
            "call split_fused(model) first, before the optimizer is made, or name qkv in max_norm"
        )
