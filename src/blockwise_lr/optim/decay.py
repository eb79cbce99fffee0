"""Weight decay by block: one value for all blocks, one per block, and blocks without weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from blockwise_lr.arguments import check_number, is_number
from blockwise_lr.blocks import Block
from blockwise_lr.blocks.block import Assignment
from blockwise_lr.optim.block_values import check_block_values

Decay = Literal["coupled", "constant"]
WeightDecay = float | Mapping[Block, float] | Mapping[str, float] | Decay
NoDecay = Iterable[Block] | Iterable[str] | Literal["1d"]

WEIGHT_DECAY = 0.1
"""The default weight decay, which is the value of the paper (arXiv 2502.19002)."""

_EXPECTED = "a finite number, 0 or above"


def resolve_decay(
    weight_decay: WeightDecay, decay: Decay, base: float = WEIGHT_DECAY
) -> tuple[dict[Block, float], Decay]:
    """Return the weight decay of every block, and how weight decay relates to the ratio.

    A mapping changes only the blocks that it names. The other blocks keep `base`.

    Args:
        weight_decay: a number for all blocks; a mapping from Block, or its string, to a number; or "coupled" or
            "constant", which mean `base` with that value of `decay`.
        decay: as in :func:`blockwise_lr.param_groups`.
        base: weight decay of the blocks that a mapping does not name.

    Returns:
        The weight decays, and "coupled" or "constant". The weight decays include QKV only if the mapping names it or if
        one number was given. Otherwise the parts of a fused weight determine its weight decay.

    Raises:
        ValueError: a value is out of range, a block is unknown, or `weight_decay` contradicts `decay`.

    Example:
        >>> decays, _ = resolve_decay({"norm": 0}, "coupled")
        >>> decays[Block.NORM], decays[Block.FFN]
        (0.0, 0.1)
    """
    if decay not in ("coupled", "constant"):
        raise ValueError(f'decay is {decay!r}; expected "coupled" or "constant"')
    if isinstance(weight_decay, Mapping):
        given = check_weight_decays(weight_decay)
        rest = dict.fromkeys((block for block in Block if block is not Block.QKV), _checked_decay(base))
        return rest | given, decay
    if isinstance(weight_decay, str):
        if weight_decay not in ("coupled", "constant"):
            if is_number(weight_decay):
                check_number(weight_decay, "weight_decay", "0.1")
            raise ValueError(
                f"weight_decay is {weight_decay!r}; expected a number, "
                'numbers by block such as {"norm": 0}, "coupled" or "constant"'
            )
        if decay == "constant" and weight_decay == "coupled":
            raise ValueError('weight_decay is "coupled" and decay is "constant"; expected one of the two')
        decay, weight_decay = weight_decay, base
    return dict.fromkeys(Block, _checked_decay(weight_decay)), decay


def check_weight_decays(
    values: Mapping[Block, float] | Mapping[str, float], name: str = "weight_decay"
) -> dict[Block, float]:
    """Return the weight decays of single blocks, with Blocks as keys.

    Args:
        values: a weight decay for each Block or its string.
        name: name of the setting in error messages.

    Raises:
        ValueError: a value is out of range, or a block is unknown.
    """
    return check_block_values(values, name, _is_valid, _EXPECTED)


def decay_of(name: str, entry: Assignment, decays: Mapping[Block, float]) -> float:
    """Return the weight decay of a parameter. A fused weight that is not split has the common value of its parts.

    Raises:
        ValueError: the parts of a fused weight need different weight decays.
    """
    if entry.block in decays:
        return decays[entry.block]
    parts = entry.parts or {"q, k": Block.QK, "v": Block.VO}
    if len({decays[block] for block in parts.values()}) > 1:
        wanted = ", ".join(f"{part} {decays[block]:g}" for part, block in parts.items())
        raise ValueError(
            f"{name} is a fused QKV weight whose parts need different weight decays ({wanted}), and one parameter can "
            f"have only one: call split_fused(model) first, before the optimizer is made, or name qkv in weight_decay"
        )
    return decays[next(iter(parts.values()))]


def resolve_no_decay(no_decay: NoDecay) -> frozenset[Block] | None:
    """Return the blocks without weight decay; None means "1d".

    Raises:
        ValueError: a block is unknown, or `no_decay` is no list: None, or a string other than "1d".
    """
    if no_decay == "1d":
        return None
    if isinstance(no_decay, str) or not isinstance(no_decay, Iterable):
        raise ValueError(
            f'no_decay is {no_decay!r}; expected a list of blocks, such as ["norm", "emb"], or "1d"'
        )
    try:
        return frozenset(Block(block) for block in no_decay)
    except ValueError as error:
        known = ", ".join(b.value for b in Block)
        raise ValueError(f"no_decay: {error}; the blocks are {known}") from None


def is_exempt(name: str, entry: Assignment, exempt: frozenset[Block]) -> bool:
    """Return whether no_decay names the block of a parameter. A fused weight is exempt if all its parts are.

    Raises:
        ValueError: no_decay names only some parts of a fused weight.
    """
    if entry.block is not Block.QKV or Block.QKV in exempt:
        return entry.block in exempt
    parts = {block in exempt for block in (entry.parts or {}).values()}
    if len(parts) > 1:
        raise ValueError(
            f"{name} is a fused QKV weight, and no_decay names only some of its parts: "
            f"call split_fused(model) first, before the optimizer is made"
        )
    return parts == {True}


def _is_valid(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _checked_decay(value: float) -> float:
    number = check_number(value, "weight_decay", "0.1")
    if not _is_valid(number):
        raise ValueError(f"weight_decay is {value}; expected {_EXPECTED}")
    return number
