"""How much faster than the base learning rate each block learns."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

from blockwise_lr.blocks import Block
from blockwise_lr.optim.by_block import check_by_block, spell_pairs


class HasRatios(Protocol):
    """A report of a measurement, or a rule: what has ratios of its own."""

    def ratios(self) -> Mapping[Block, float]:
        """Return a ratio by block."""


Ratios = Mapping[Block, float] | Mapping[str, float] | HasRatios | Sequence[HasRatios] | str

PAPER_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.NORM: 1.0, Block.VO: 4.0, Block.FFN: 6.0, Block.QK: 8.0, Block.EMB: 10.0}
)
"""The paper's ratios, tuned by its authors on LLaMA 0.25B and MiniPile (arXiv 2502.19002). Blocks that are
not named, the untied output head among them, have ratio 1."""

UNIFORM_RATIOS: Mapping[Block, float] = MappingProxyType({})
"""Every block at the base learning rate: plain AdamW, the baseline."""

QUICKSTART_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.VO: 0.1, Block.NORM: 8.0, Block.EMB: 8.0, Block.HEAD: 8.0}
)
"""Ratios searched for the quickstart's small model and text (studies/2026-11-quickstart-ratios), not for others."""

MEASURED_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.EMB: 16.0, Block.QK: 4.0, Block.FFN: 1.0, Block.VO: 0.5, Block.NORM: 32.0, Block.HEAD: 16.0}
)
"""Ratios measured along two uniform runs of the quickstart's model (studies/2026-11-ratio-rules), in powers of two.

They keep the paper's order among the matrices, EMB > QK > FFN > VO, with NORM and HEAD fast. The base learning rate is
FFN's.
"""


def resolve_ratios(ratios: Ratios) -> dict[Block, float]:
    """Return a ratio for every block: those given, and 1 for the rest.

    Args:
        ratios: learning-rate ratio by block, with Blocks or their strings ("qk") as keys; a name of
            :data:`NAMED_RATIOS` ("paper", "measured", "uniform", "quickstart"); or what has ratios of its own: a
            SharpnessReport, a DirectionalReport or a sequence of them along a run, an AutoRule.

    Raises:
        ValueError: an unknown name, a key that is no block, or a ratio that is not a positive finite number.
        TypeError: neither a mapping nor any of the others.

    Example:
        >>> resolve_ratios({"qk": 8})[Block.QK], resolve_ratios({})[Block.EMB], resolve_ratios("paper")[Block.EMB]
        (8.0, 1.0, 10.0)
    """
    given = check_by_block(
        given_ratios(ratios),
        "ratios",
        lambda value: math.isfinite(value) and value > 0,
        "a finite number above 0",
    )
    return dict.fromkeys(Block, 1.0) | given


NAMED_RATIOS: Mapping[str, Mapping[Block, float]] = MappingProxyType(
    {
        "uniform": UNIFORM_RATIOS,
        "paper": PAPER_RATIOS,
        "measured": MEASURED_RATIOS,
        "quickstart": QUICKSTART_RATIOS,
    }
)
"""The ratios that have a name."""


def given_ratios(ratios: Ratios, *, more: Sequence[str] = ()) -> Mapping[Any, float]:
    """Return the mapping that `ratios` stands for, without the blocks that it does not name.

    Args:
        ratios: as :func:`resolve_ratios` takes them.
        more: names that the caller knows besides, for the message.

    Raises:
        ValueError: no such name; lists the names, and says how to read a file.
        TypeError: neither a mapping nor a name nor a report.

    Example:
        >>> given_ratios("measured") is MEASURED_RATIOS
        True
    """
    if isinstance(ratios, str):
        return _by_name(ratios, more)
    own = getattr(ratios, "ratios", None)
    if callable(own):  # MeasuredRatios has an attribute of this name
        return cast("Mapping[Block, float]", own())
    if isinstance(ratios, Mapping):
        return ratios
    if isinstance(ratios, Sequence):
        along = getattr(ratios[0], "ratios_of_run", None) if ratios else None
        if along is None:
            what = f"a {type(ratios).__name__}" if ratios else f"an empty {type(ratios).__name__}"
            raise TypeError(f"ratios is {what}; {_EXPECTED}")
        return cast("Mapping[Block, float]", along(ratios))
    if isinstance(ratios, os.PathLike):
        raise TypeError(f"ratios is a path, {os.fspath(ratios)}; {_how_to_read(os.fspath(ratios))}")
    raise TypeError(f"ratios is {ratios!r:.60}; {_EXPECTED}")


_EXPECTED = (
    'expected a name such as "paper", a mapping such as {"emb": 10, "qk": 8}, or a report of a measurement'
)


def _by_name(text: str, more: Sequence[str]) -> Mapping[Block, float]:
    if text in NAMED_RATIOS:
        return NAMED_RATIOS[text]
    names = ", ".join(f'"{name}"' for name in (*NAMED_RATIOS, *more))
    if text.partition(":")[0] == "auto":
        raise ValueError(
            f"ratios is {text!r}, ratios that move in the run: give them to BlockwiseTrainer, or in a loop of your own "
            "use ratios=AutoRule() and AutoRatios(optimizer, schedule, AutoRule()); expected a name that stands for "
            f"fixed ones ({names})"
        )
    if text.endswith(".json") or is_file(text):
        raise ValueError(f"ratios is {text!r}, the name of a file; {_how_to_read(text)}")
    if "=" in text:
        raise ValueError(f'ratios is {text!r}; expected a mapping here, such as {{"emb": 4, "vo": 0.5}}')
    raise ValueError(f"ratios is {text!r}; the names are {names}; {_EXPECTED}")


def _how_to_read(path: str) -> str:
    return (
        f"read it first: ratios=json.load(open({path!r})) for {{block: ratio}}, or "
        f"ratios=SharpnessReport.from_json({path!r}) or DirectionalReport.from_json({path!r}) for a measurement"
    )


def spell_ratios(ratios: Ratios) -> str:
    """The inverse of :func:`blockwise_lr.train.ratio_text.parse_ratios`, without the blocks whose ratio is 1.

    Example:
        >>> spell_ratios(PAPER_RATIOS)
        'emb=10,qk=8,vo=4,ffn=6'
    """
    unequal = {block: ratio for block, ratio in resolve_ratios(ratios).items() if ratio != 1}
    return spell_pairs(unequal) or "uniform"


def is_file(text: str) -> bool:
    """Return whether `text` names a file. Long text, such as many pairs, names none."""
    try:
        return Path(text).is_file()
    except OSError:  # many pairs are no file name: too long
        return False
