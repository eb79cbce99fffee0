"""Block maps and mappings with one number per block: validation, and their form as text on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import nn

from blockwise_lr.blocks import Block, BlockMap, classify


def block_map_of(model: nn.Module, blocks: BlockMap | None) -> BlockMap:
    """Return the block map that the user gave, or that of the model if there is none.

    Raises:
        TypeError: `blocks` is no BlockMap, such as a dictionary of overrides; the message says what to write.
    """
    if blocks is None:
        return classify(model)
    if not isinstance(blocks, BlockMap):
        raise TypeError(
            f"blocks is a {type(blocks).__name__}; expected a BlockMap: blocks=classify(model), or with overrides "
            'blocks=classify(model, overrides={"lm_head.weight": "head"})'
        )
    return blocks


def check_block_values(
    values: Mapping[Any, Any], name: str, allowed: Callable[[float], bool], expected: str
) -> dict[Block, float]:
    """Return the mapping with Blocks as keys and floats as values.

    Args:
        values: a number for each Block or its string.
        name: name of the mapping in error messages.
        allowed: returns whether a number is in range.
        expected: description of the range in error messages.

    Raises:
        ValueError: a key is not a block, or a value is not a number or is out of range.

    Example:
        >>> check_block_values({"qk": 2}, "ratios", lambda value: value > 0, "a number above 0")
        {<Block.QK: 'qk'>: 2.0}
    """
    checked = {}
    for key, value in values.items():
        try:
            block = Block(key)
        except ValueError:
            known = ", ".join(b.value for b in Block)
            raise ValueError(f"{name}: {key!r} is not a block; the blocks are {known}") from None
        if isinstance(value, bool) or not isinstance(value, Real) or not allowed(_as_float(value)):
            raise ValueError(f"{name}: {block.value} is {value!r}; expected {expected}")
        checked[block] = float(value)
    return checked


def parse_pairs(text: str, name: str) -> dict[str, float]:
    """Parse text such as ``"emb=4,vo=0.5"``. :func:`check_block_values` checks whether the keys are blocks.

    Raises:
        ValueError: an item between commas does not have the form ``block=number``, or a block occurs twice.

    Example:
        >>> parse_pairs("emb=4, vo=0.5", "ratios")
        {'emb': 4.0, 'vo': 0.5}
    """
    values: dict[str, float] = {}
    for pair in text.split(","):
        block, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f'{name}: {pair.strip()!r} is no pair such as "emb=4" (in {text!r})')
        if block in values:
            raise ValueError(f"{name}: {block} is there twice (in {text!r}); expected every block once")
        try:
            values[block] = float(value)
        except ValueError as error:
            raise ValueError(f'{name}: {text!r}: {error}; expected pairs such as "emb=4"') from None
    return values


def _as_float(value: Any) -> float:
    """Convert to float; integers too large for a float become infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def format_pairs(values: Mapping[Block, float]) -> str:
    """Return the mapping as text for :func:`parse_pairs`, in the order of :class:`Block`.

    Example:
        >>> format_pairs({Block.VO: 0.5, Block.EMB: 4.0})
        'emb=4,vo=0.5'
    """
    return ",".join(f"{block.value}={digits(values[block])}" for block in Block if block in values)


def digits(value: float) -> str:
    """Return the number with as few digits as identify it exactly.

    Example:
        >>> digits(4.0), digits(0.1 + 0.2)
        ('4', '0.30000000000000004')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
