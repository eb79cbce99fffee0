"""Read block overrides from the command line and from JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwise_lr.errors import UserError

if TYPE_CHECKING:
    from blockwise_lr.blocks import Block


def read_overrides(given: Sequence[str]) -> dict[str | type[Any], Block]:
    """Return the overrides for ``classify`` from ``REGEX=BLOCK`` pairs and JSON files of ``{"REGEX": "BLOCK"}``.

    Args:
        given: pairs, or paths of files that end in ``.json``. The overrides keep this order.

    Raises:
        UserError: an entry is neither of the two, a file cannot be read or holds something else, or a block is
            unknown.

    Example:
        >>> read_overrides(["transform=other"])
        {'transform': <Block.OTHER: 'other'>}
    """
    found: dict[str | type[Any], Block] = {}
    for each in given:
        if each.lower().endswith(".json"):
            found |= {
                pattern: _block(block, f"{each}: {pattern!r}") for pattern, block in _read_json(each).items()
            }
            continue
        pattern, _, block = each.rpartition("=")
        if not pattern:
            raise UserError(f"--blocks {each!r} is neither REGEX=BLOCK nor a .json file of such pairs")
        found[pattern] = _block(block, f"--blocks {each!r}")
    return found


def _block(given: Any, where: str) -> Block:
    from blockwise_lr.blocks import Block  # imported here because it loads torch

    try:
        return Block(given)
    except ValueError:
        raise UserError(
            f"{where} names {given!r}, which is no block; the blocks are {', '.join(Block)}"
        ) from None


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the overrides in {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f'{path} holds {type(values).__name__}; expected an object, {{"REGEX": "BLOCK", ...}}'
        )
    return values
