"""The initial scale of each block: the root mean square (RMS) of its weights before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.distributed import is_sharded
from blockwise_lr.optim.block_values import block_map_of, check_block_values

RelativeTo = Literal["init"] | Mapping[Block, float] | Mapping[str, float] | None
"""The type of `relative_to=`: "init", the initial scale of each block, or None."""

REFERENCE_SCALES: Mapping[Block, float] = MappingProxyType(
    {
        Block.EMB: 0.02,
        Block.POS: 0.02,
        Block.QK: 0.02,
        Block.VO: 0.02,
        Block.QKV: 0.02,
        Block.FFN: 0.02,
        Block.ROUTER: 0.02,
        Block.HEAD: 0.02,
        Block.NORM: 1.0,
    }
)
"""The initial scales that named ratios refer to: those of transformers' LLaMA, on which `measured` and `quickstart`
were found. Every matrix starts with standard deviation 0.02 and every gain at 1. Blocks that are missing here (SSM,
CONV and OTHER) mix parameters of different kinds, so no initial scale applies to them."""

_DIGITS = 2


def initial_scales(model: nn.Module, blocks: BlockMap | None = None) -> dict[Block, float]:
    """Return the RMS of each block's trainable weights, rounded to two digits.

    Call this on a newly initialised model. On a trained one, it returns the scale of the trained weights.

    Parameters that are exactly zero are left out, because zero says nothing about a scale: biases, or output
    projections that start at zero. A block that starts at zero altogether is missing from the result. NORM is the
    exception: gains that start at zero are stored as their difference from 1, so the scale is 1.

    Rounding removes the sampling error. Two seeds, or two devices, thus give the same learning rates.

    Args:
        model: the model. Its weights may be sharded DTensors; all processes must then call this function.
        blocks: a BlockMap of the model. Default: ``classify(model)``.

    Raises:
        ValueError: the weights are on the meta device, so they have no values yet.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(64, 64), "ln_f": nn.LayerNorm(64)})
        >>> initial_scales(model)[Block.NORM]
        1.0
    """
    check_model(model, "initial_scales")
    blocks = block_map_of(model, blocks)
    sums: dict[Block, list[tuple[float, int]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.is_meta:
                raise ValueError(
                    f"{name} is on the meta device, so it has no initial values yet: load or initialise the model "
                    "first, or give the scale of each block, relative_to={'ffn': 0.02, 'emb': 1.0, ...}"
                )
            squares = _norm(parameter) ** 2
            sums.setdefault(blocks.assignment(name).block, []).append((squares, parameter.numel()))
    means = {}
    for block in (block for block in Block if block in sums):
        nonzero = [(square, numel) for square, numel in sums[block] if square > 0]
        total = sum(numel for _, numel in nonzero)
        means[block] = math.sqrt(sum(square for square, _ in nonzero) / total) if total else 0.0
    return scales_of_rms(means)


def scales_of_rms(rms: Mapping[Block, float | None]) -> dict[Block, float]:
    """Return the scale of each block from the RMS of its weights, as :func:`initial_scales` does.

    Args:
        rms: the RMS of each block. 0: its weights start at zero. None: it is not known.

    Example:
        >>> scales_of_rms({Block.FFN: 0.01998, Block.NORM: 0.0, Block.HEAD: 0.0})
        {<Block.FFN: 'ffn'>: 0.02, <Block.NORM: 'norm'>: 1.0}
    """
    known = {block: value for block, value in rms.items() if value is not None and math.isfinite(value)}
    if known.get(Block.NORM) == 0:
        known[Block.NORM] = 1.0
    return {block: float(f"{value:.{_DIGITS}g}") for block, value in known.items() if value > 0}


def resolve_relative_to(
    relative_to: RelativeTo, model: nn.Module, blocks: BlockMap | None = None
) -> dict[Block, float] | None:
    """Return the initial scale of each block that `relative_to` stands for; None for None.

    Args:
        relative_to: as in :func:`blockwise_lr.param_groups`.
        model: the model, which "init" measures.
        blocks: a BlockMap of the model. Default: ``classify(model)``.

    Raises:
        ValueError: `relative_to` is another string, or a mapping with an unknown block or a scale out of range.
    """
    if relative_to is None:
        return None
    if isinstance(relative_to, Mapping):
        return check_block_values(
            relative_to,
            "relative_to",
            lambda value: math.isfinite(value) and value > 0,
            "a finite number above 0",
        )
    if relative_to != "init":
        raise ValueError(
            f'relative_to is {relative_to!r}; expected "init", None, or the initial scale of each block, such as '
            '{"emb": 1.0, "ffn": 0.02, ...}'
        )
    return initial_scales(model, blocks)


def scale_factor(block: Block, scales: Mapping[Block, float]) -> float:
    """Return the factor by which the initial scale of a block changes its learning rate.

        factor(b) = (scale_b / reference_b) / (scale_FFN / reference_FFN)

    With this factor, the learning rate of every block over its initial scale, relative to that of FFN, is the same for
    every initialisation. It is 1 for FFN, and for blocks without a reference scale.

    Args:
        block: the block.
        scales: the initial scale of each block.

    Raises:
        ValueError: `scales` lacks the block or FFN, for example because it starts at zero.

    Example:
        >>> scale_factor(Block.EMB, {Block.EMB: 1.0, Block.FFN: 0.02})
        50.0
    """
    if block not in REFERENCE_SCALES:
        return 1.0
    for needed in (block, Block.FFN):
        if needed not in scales:
            raise ValueError(_missing(needed))
    ffn = scales[Block.FFN] / REFERENCE_SCALES[Block.FFN]
    return scales[block] / REFERENCE_SCALES[block] / ffn


def _missing(block: Block) -> str:
    what = f"relative_to needs the initial scale of {block.value}"
    if block is Block.FFN:
        what += ", to which all others relate"
    return (
        f"{what}, and there is none: the block starts at zero, is absent, or is not named. Give its scale: "
        f'relative_to={{**initial_scales(model), "{block.value}": {REFERENCE_SCALES[block]:g}}} '
        f"({REFERENCE_SCALES[block]:g} is the scale that ratios are made for), or leave out relative_to"
    )


def _norm(parameter: Tensor) -> float:
    """Return the L2 norm of a parameter, over all processes if it is sharded."""
    norm = torch.linalg.vector_norm(
        parameter.detach(), dtype=torch.promote_types(parameter.dtype, torch.float32)
    )
    return float(norm.full_tensor() if is_sharded(norm) else norm)
