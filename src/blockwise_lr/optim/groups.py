"""Parameter groups with a learning rate per block, for any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from blockwise_lr.arguments import check_model, check_number
from blockwise_lr.blocks import Block, BlockMap, classify
from blockwise_lr.blocks.block import Assignment
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
from blockwise_lr.optim.known_structures import remember_structures
from blockwise_lr.optim.overwritten_lrs import watch_next_optimizer
from blockwise_lr.optim.ratios import PAPER_RATIOS, Ratios, given_ratios, resolve_ratios

# NORM first: trainers that log one learning rate log group 0's, and NORM's ratio is 1 (METHOD section 7).
_ORDER = (Block.NORM, *(block for block in Block if block is not Block.NORM))


def param_groups(
    model: nn.Module,
    lr: float,
    ratios: Ratios = PAPER_RATIOS,
    *,
    weight_decay: WeightDecay = WEIGHT_DECAY,
    no_decay: NoDecay = (),
    decay: Decay = "coupled",
    blocks: BlockMap | None = None,
) -> list[dict[str, Any]]:
    """One parameter group per (block, weight decay), each at ``ratio * lr``.

        eta_b = r(b) * eta_base                                                   (METHOD section 3)

    Args:
        model: the model; call ``split_fused(model)`` first if it has fused QKV weights.
        lr: base learning rate eta_base, the peak of a block whose ratio is 1.
        ratios: r(b) by Block or its string, where a missing block is 1; or a name: "paper", "measured" or "uniform".
            A report, or a list of DirectionalReports, stands for its ``ratios()``. Default: the paper's.
        weight_decay: decoupled weight decay as torch's AdamW takes it, so that a step shrinks a weight by
            ``lr * weight_decay``. A number, 0.1 by default; or numbers by Block or its string, where a block that is
            not named keeps the 0.1 that it has by default (``{**dict.fromkeys(Block, 0.05), "norm": 0}`` says it for
            all); or "coupled" or "constant", 0.1 with that `decay`.
        no_decay: blocks without weight decay, whatever `weight_decay` says of them, or "1d" for every parameter with
            fewer than two dimensions.
            Default: none, since the authors decay every parameter, norms too.
        decay: "coupled" (the authors' way) leaves weight_decay as it is, so that a block's decay per step
            grows with its ratio; "constant" divides it, each block's own, by the ratio, so that every block decays as
            it would at the base learning rate. The schedules of this library keep that true at every step.
        blocks: a BlockMap of the model, to classify it only once or with overrides. Default: ``classify(model)``.

    Returns:
        Group dicts for ``torch.optim.AdamW`` and the like; NORM first, none empty. Beside ``params`` each has
        ``lr`` and ``initial_lr`` (ratio * base), ``weight_decay``, ``block`` (a plain str), ``lr_ratio``,
        ``decay`` and ``names`` (the parameters' names, in the order of ``params``).

    Raises:
        ValueError: lr or weight_decay out of range; an unknown block in ratios, weight_decay or no_decay; a fused
            QKV weight that was not split while its parts would get different learning rates or decays; a parameter
            that no rule classifies; nothing to train.
        TypeError: the model is not a module (parameters, a state_dict ...), or lr is no number; says what to write.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> [(g["block"], g["lr"]) for g in param_groups(model, lr=1e-3)]
        [('norm', 0.001), ('emb', 0.01)]
        >>> [g["weight_decay"] for g in param_groups(model, lr=1e-3, weight_decay={"norm": 0})]
        [0.0, 0.1]
    """
    check_model(model, "param_groups")
    given, lr, ratios = lr, check_number(lr, "lr", "1e-3"), given_ratios(ratios)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr is {given}; expected a finite number above 0")
    decays, decay = resolve_decay(weight_decay, decay)
    ratio_of = resolve_ratios(ratios)
    exempt = resolve_no_decay(no_decay)
    blocks = classify(model) if blocks is None else blocks

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
            f"{type(model).__name__} has no parameter with requires_grad=True, so there is nothing to train"
        )

    groups = []
    for block, own_decay in sorted(members, key=lambda key: (_ORDER.index(key[0]), -key[1])):
        ratio = _group_ratio(block, members[block, own_decay], blocks, ratio_of, ratios)
        groups.append(
            {
                "params": [parameter for _, parameter in members[block, own_decay]],
                "lr": ratio * lr,
                "initial_lr": ratio * lr,
                "weight_decay": own_decay / ratio if decay == "constant" else own_decay,
                "block": block.value,
                "lr_ratio": ratio,
                "decay": decay,
                "names": [name for name, _ in members[block, own_decay]],
            }
        )
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
    # _refuse_unsplit has seen to it that all parts agree.
    shared = {r for name, _ in members for r in _part_ratios(blocks.assignment(name), ratio_of).values()}
    return shared.pop() if shared else 1.0
