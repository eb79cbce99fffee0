"""Parameter groups with a learning rate per block, for any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from blockwise_lr.arguments import check_model, check_number
from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.blocks.block import Assignment
from blockwise_lr.optim.block_values import block_map_of
from blockwise_lr.optim.decay import (
    WEIGHT_DECAY,
    Decay,
    NoDecay,
    WeightDecay,
    decay_of,
    is_exempt,
    resolve_decay,
    resolve_no_decay,
)
from blockwise_lr.optim.initial_scales import RelativeTo, resolve_relative_to, scale_factor
from blockwise_lr.optim.known_structures import remember_structures
from blockwise_lr.optim.overwritten_lrs import watch_next_optimizer
from blockwise_lr.optim.ratios import DEFAULT_RATIOS, Ratios, given_ratios, resolve_ratios

# NORM stays first: optimizers load saved groups by position. A trainer that logs only the rate of group 0 logs NORM's.
_ORDER = (Block.NORM, *(block for block in Block if block is not Block.NORM))


def param_groups(
    model: nn.Module,
    lr: float,
    ratios: Ratios = DEFAULT_RATIOS,
    *,
    weight_decay: WeightDecay = WEIGHT_DECAY,
    no_decay: NoDecay = (),
    decay: Decay = "coupled",
    relative_to: RelativeTo = None,
    blocks: BlockMap | None = None,
) -> list[dict[str, Any]]:
    """Return one parameter group per pair of block and weight decay, each with learning rate ``ratio * lr``.

        eta_b = r(b) * eta_base                     (arXiv 2502.19002)

    Args:
        model: the model. If it has fused QKV weights, call ``split_fused(model)`` first.
        lr: base learning rate eta_base, which is the peak of a block whose ratio is 1. With the default ratios, give
            the learning rate that you tuned for one rate for all parameters.
        ratios: the ratio r(b) of each block. One of:

            - a mapping from Block, or its string, to a number; blocks that it does not name have ratio 1;
            - a name: "half" (:data:`DEFAULT_RATIOS`, the default), "measured", "paper" or "uniform";
            - a SharpnessReport, a DirectionalReport or a list of DirectionalReports, whose ``ratios()`` are used.
        weight_decay: decoupled weight decay in the meaning of torch's AdamW: a step shrinks a weight by
            ``lr * weight_decay``. One of:

            - a number for all blocks; the default is 0.1;
            - a mapping from Block, or its string, to a number; blocks that it does not name keep 0.1. To set all
              blocks, write ``{**dict.fromkeys(Block, 0.05), "norm": 0}``;
            - "coupled" or "constant", which mean 0.1 with that value of `decay`.
        no_decay: blocks without weight decay; this overrides `weight_decay`. "1d" exempts every parameter with fewer
            than two dimensions. Default: none, because the paper's authors decay all parameters, norms included.
        decay: how weight decay relates to the ratio. "coupled" (default, as in the authors' code) uses `weight_decay`
            unchanged, so the shrinkage per step grows with the ratio. "constant" divides the weight decay of each
            block by its ratio, so every block shrinks as it would at the base learning rate. The schedules of this
            library maintain this at every step.
        relative_to: what the ratios relate to. None (default): the learning rate. "init": the learning rate over the
            initial scale of the block, so that ratios carry between initialisations. The learning rate of block b is
            then ``ratio * factor(b) * lr``:

                factor(b) = (scale_b / reference_b) / (scale_FFN / reference_FFN)

            scale_b is the RMS of the block's weights at start, and reference_b is that of transformers' LLaMA: 1 for
            NORM and 0.02 for matrices. The factor also scales the block's floor, and it divides the weight decay, so
            that a step shrinks the weights as before. `lr` stays the rate of FFN. SSM, CONV and OTHER have factor 1.
            Call this before training, because "init" measures the weights as they are. For trained weights, or for a
            block that starts at zero, give the scales: a mapping from Block to its RMS at start, such as
            ``{**initial_scales(model), "head": 0.02}``.
        blocks: a BlockMap of the model. Pass one to classify only once, or to override the rules.
            Default: ``classify(model)``.

    Returns:
        Group dicts for ``torch.optim.AdamW`` and other optimizers. The NORM group comes first and no group is empty.
        A trainer that logs the learning rate of group 0 only therefore logs NORM's, which is 6 * lr by default.
        Each has ``params``, ``lr`` and ``initial_lr`` (both ratio * base), ``weight_decay``, ``block`` (a plain str),
        ``lr_ratio``, ``decay`` and ``names`` (the parameters' names, in the order of ``params``). With `relative_to`,
        ``lr_ratio`` includes the factor, and the groups also have ``init_scale`` (the factor) and, unless the block has
        no scale, ``init_rms`` (its RMS at start). Both are plain floats, which checkpoints keep.

    Raises:
        ValueError: lr or weight_decay is out of range; ratios, weight_decay or no_decay names an unknown block; a
            fused QKV weight is not split and its parts need different learning rates or weight decays; no rule
            classifies a parameter; the model has no trainable parameter; or `relative_to` has no scale for a block.
        TypeError: `model` is not a module (for example its parameters or state_dict), `blocks` is no BlockMap, or `lr`
            is not a number. The message shows the correct call.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> [(g["block"], g["lr"]) for g in param_groups(model, lr=1e-3)]
        [('norm', 0.006), ('emb', 0.004)]
        >>> [g["weight_decay"] for g in param_groups(model, lr=1e-3, weight_decay={"norm": 0})]
        [0.0, 0.1]
        >>> scales = {"emb": 1.0, "norm": 1.0, "ffn": 0.02}
        >>> [(g["block"], g["lr"]) for g in param_groups(model, 1e-3, "measured", relative_to=scales)]
        [('norm', 0.032), ('emb', 0.8)]
    """
    check_model(model, "param_groups")
    given, lr, ratios = lr, check_number(lr, "lr", "1e-3"), given_ratios(ratios)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr is {given}; expected a finite number above 0")
    decays, decay = resolve_decay(weight_decay, decay)
    ratio_of = resolve_ratios(ratios)
    exempt = resolve_no_decay(no_decay)
    blocks = block_map_of(model, blocks)

    scales = resolve_relative_to(relative_to, model, blocks)

    members: dict[tuple[Block, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        entry = blocks.assignment(name)
        if entry.block is Block.QKV and not _names_block(ratios, Block.QKV):
            _refuse_unsplit(name, entry, ratio_of)
        exempted = parameter.ndim < 2 if exempt is None else is_exempt(name, entry, exempt)
        own_decay = 0.0 if exempted else decay_of(name, entry, decays)
        members.setdefault((entry.block, own_decay), []).append((name, parameter))
    if not members:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad=True, so there is nothing to train: "
            "call requires_grad_(True) on the parameters to train first"
        )

    groups = []
    for block, own_decay in sorted(members, key=lambda key: (_ORDER.index(key[0]), -key[1])):
        own_ratio = _group_ratio(block, members[block, own_decay], blocks, ratio_of, ratios)
        factor = 1.0 if scales is None else scale_factor(block, scales)
        ratio = own_ratio * factor
        groups.append(
            {
                "params": [parameter for _, parameter in members[block, own_decay]],
                "lr": ratio * lr,
                "initial_lr": ratio * lr,
                # A step shrinks weights by lr * weight_decay, which the initial scale must not change.
                "weight_decay": own_decay / (ratio if decay == "constant" else factor),
                "block": block.value,
                "lr_ratio": ratio,
                "decay": decay,
                "names": [name for name, _ in members[block, own_decay]],
            }
        )
        if scales is not None:
            groups[-1] |= {"init_scale": factor, **({"init_rms": scales[block]} if block in scales else {})}
    remember_structures(
        (parameter, blocks.assignment(name).structure)
        for pairs in members.values()
        for name, parameter in pairs
    )
    watch_next_optimizer(groups)
    return groups


def _names_block(ratios: Mapping[Any, float], block: Block) -> bool:
    return any(key == block for key in ratios)


def _part_ratios(entry: Assignment, ratio_of: dict[Block, float]) -> dict[str, float]:
    return {part: ratio_of[block] for part, block in (entry.parts or {}).items()}


def _refuse_unsplit(name: str, entry: Assignment, ratio_of: dict[Block, float]) -> None:
    parts = _part_ratios(entry, ratio_of)
    if len(set(parts.values())) > 1:
        wanted = ", ".join(f"{part} x{ratio:g}" for part, ratio in parts.items())
        raise ValueError(
            f"{name} is a fused QKV weight whose parts need different learning rates ({wanted}), and one parameter "
            f"can have only one: call split_fused(model) first, before the optimizer is made"
        )


def _group_ratio(
    block: Block,
    members: list[tuple[str, nn.Parameter]],
    blocks: BlockMap,
    ratio_of: dict[Block, float],
    ratios: Mapping[Any, float],
) -> float:
    if block is not Block.QKV or _names_block(ratios, Block.QKV):
        return ratio_of[block]
    # All parts have the same ratio here: _refuse_unsplit raised an error otherwise.
    shared = {r for name, _ in members for r in _part_ratios(blocks.assignment(name), ratio_of).values()}
    return shared.pop() if shared else 1.0
