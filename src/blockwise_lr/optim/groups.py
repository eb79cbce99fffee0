"""Parameter groups with a learning rate per block, for any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from blockwise_lr.blocks import Block, BlockMap, classify
from blockwise_lr.blocks.block import Assignment
from blockwise_lr.optim.auto_rule import AutoRule
from blockwise_lr.optim.partitions import Partition, partitions
from blockwise_lr.optim.ratios import PAPER_RATIOS, Ratios, resolve_ratios

NoDecay = Iterable[Block] | Iterable[str] | Literal["1d"]

# NORM first: trainers that log one learning rate log group 0's, and NORM's ratio is 1 (METHOD section 7).
_ORDER = (Block.NORM, *(block for block in Block if block is not Block.NORM))


def param_groups(
    model: nn.Module,
    lr: float,
    ratios: Ratios = PAPER_RATIOS,
    *,
    weight_decay: float = 0.1,
    no_decay: NoDecay = (),
    decay: Literal["coupled", "constant"] = "coupled",
    blocks: BlockMap | None = None,
) -> list[dict[str, Any]]:
    """One parameter group per (block, weight decay), each at ``ratio * lr``.

        eta_b = r(b) * eta_base                                                   (METHOD section 3)

    Args:
        model: the model; call ``split_fused(model)`` first if it has fused QKV weights.
        lr: base learning rate eta_base, the peak of a block whose ratio is 1.
        ratios: r(b) by Block or its string; a missing block is 1. A SharpnessReport, or DirectionalReports, stand for
            ``ratios_from_sharpness(report)``, an AutoRule for the ratios it begins with. Default: the paper's.
        weight_decay: decoupled weight decay as torch's AdamW takes it, so that a step shrinks a weight by
            ``lr * weight_decay``.
        no_decay: blocks without weight decay, or "1d" for every parameter with fewer than two dimensions.
            Default: none, since the authors decay every parameter, norms too.
        decay: "coupled" (the authors' way) leaves weight_decay as it is, so that a block's decay per step
            grows with its ratio; "constant" divides it by the ratio, so that every block decays as it would
            at the base learning rate. The schedules of this library keep that true at every step.
        blocks: a BlockMap of the model, to classify it only once or with overrides. Default: ``classify(model)``.

    Returns:
        Group dicts for ``torch.optim.AdamW`` and the like; NORM first, none empty. Beside ``params`` each has
        ``lr`` and ``initial_lr`` (ratio * base), ``weight_decay``, ``block`` (a plain str), ``lr_ratio``,
        ``decay``, ``names`` (the parameters' names, in the order of ``params``) and ``partitions`` (how
        :class:`blockwise_lr.AdamMini` cuts each of them; other optimizers do not look at it).

    Raises:
        ValueError: lr or weight_decay out of range; an unknown block in ratios or no_decay; a fused QKV
            weight that was not split while its parts would get different learning rates; a parameter that no
            rule classifies; nothing to train.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> [(g["block"], g["lr"]) for g in param_groups(model, lr=1e-3)]
        [('norm', 0.001), ('emb', 0.01)]
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr is {lr}; expected a finite number above 0")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay is {weight_decay}; expected a finite number, 0 or above")
    if decay not in ("coupled", "constant"):
        raise ValueError(f'decay is {decay!r}; expected "coupled" or "constant"')
    ratio_of = resolve_ratios(ratios)
    exempt = _resolve_no_decay(no_decay)
    blocks = classify(model) if blocks is None else blocks
    cut = partitions(model, blocks)

    members: dict[tuple[Block, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        entry = blocks.assignment(name)
        if entry.block is Block.QKV and not _names_block(ratios, Block.QKV):
            _refuse_unsplit(name, entry, ratio_of)
        exempted = parameter.ndim < 2 if exempt is None else _is_exempt(name, entry, exempt)
        decayed = weight_decay > 0 and not exempted
        members.setdefault((entry.block, decayed), []).append((name, parameter))
    if not members:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad=True, so there is nothing to train"
        )

    groups = []
    for block, decayed in sorted(members, key=lambda key: (_ORDER.index(key[0]), not key[1])):
        ratio = _group_ratio(block, members[block, decayed], blocks, ratio_of, ratios)
        groups.append(
            {
                "params": [parameter for _, parameter in members[block, decayed]],
                "lr": ratio * lr,
                "initial_lr": ratio * lr,
                "weight_decay": (weight_decay / (ratio if decay == "constant" else 1.0)) if decayed else 0.0,
                "block": block.value,
                "lr_ratio": ratio,
                "decay": decay,
                "names": [name for name, _ in members[block, decayed]],
                "partitions": [_as_list(cut[name]) for name, _ in members[block, decayed]],
            }
        )
    return groups


def _as_list(partition: Partition | None) -> list[int] | None:
    return None if partition is None else list(partition)  # as torch.load with weights_only takes it


def _resolve_no_decay(no_decay: NoDecay) -> frozenset[Block] | None:
    """The blocks without decay; None stands for "1d"."""
    if no_decay == "1d":
        return None
    if isinstance(no_decay, str):
        raise ValueError(
            f'no_decay is {no_decay!r}; expected a list of blocks, such as ["norm", "emb"], or "1d"'
        )
    try:
        return frozenset(Block(block) for block in no_decay)
    except ValueError as error:
        known = ", ".join(b.value for b in Block)
        raise ValueError(f"no_decay: {error}; the blocks are {known}") from None


def _is_exempt(name: str, entry: Assignment, exempt: frozenset[Block]) -> bool:
    """Whether no_decay names the parameter's block; of a fused weight, the blocks of all its parts."""
    if entry.block is not Block.QKV or Block.QKV in exempt:
        return entry.block in exempt
    parts = {block in exempt for block in (entry.parts or {}).values()}
    if len(parts) > 1:
        raise ValueError(
            f"{name} is a fused QKV weight, and no_decay names only some of its parts: "
            f"call split_fused(model) first, before the optimizer is made"
        )
    return parts == {True}


def _names_block(ratios: Ratios, block: Block) -> bool:
    return not isinstance(ratios, AutoRule) and any(key == block for key in ratios)


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
    ratios: Ratios,
) -> float:
    if block is not Block.QKV or _names_block(ratios, Block.QKV):
        return ratio_of[block]
    # _refuse_unsplit has seen to it that all parts agree.
    shared = {r for name, _ in members for r in _part_ratios(blocks.assignment(name), ratio_of).values()}
    return shared.pop() if shared else 1.0
