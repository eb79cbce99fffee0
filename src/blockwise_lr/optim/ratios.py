"""Learning-rate ratios: the learning rate of each block divided by the base learning rate."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from blockwise_lr.blocks import Block
from blockwise_lr.optim.block_values import check_block_values, format_pairs


class HasRatios(Protocol):
    """An object with a ``ratios()`` method, such as a measurement report or an AutoRule."""

    def ratios(self) -> Mapping[Block, float]:
        """Return the learning-rate ratio of each block."""


Ratios = Mapping[Block, float] | Mapping[str, float] | HasRatios | Sequence[HasRatios] | str
"""The type of `ratios=`: a mapping from blocks or their names, one or more reports, or the name of a known set."""

PAPER_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.NORM: 1.0, Block.VO: 4.0, Block.FFN: 6.0, Block.QK: 8.0, Block.EMB: 10.0}
)
"""The ratios of the paper (arXiv 2502.19002), which its authors tuned on LLaMA 0.25B and MiniPile. All other blocks,
including an untied output head, have ratio 1."""

UNIFORM_RATIOS: Mapping[Block, float] = MappingProxyType({})
"""The baseline: every block has the base learning rate, as in plain AdamW."""

QUICKSTART_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.VO: 0.1, Block.NORM: 8.0, Block.EMB: 8.0, Block.HEAD: 8.0}
)
"""Ratios found by a search on the quickstart's small model and text (studies/2026-11-quickstart-ratios). Do not use
them for other models."""

MEASURED_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.EMB: 16.0, Block.QK: 4.0, Block.FFN: 1.0, Block.VO: 0.5, Block.NORM: 32.0, Block.HEAD: 16.0}
)
"""Ratios measured during two uniform runs of the quickstart's model (studies/2026-11-ratio-rules), rounded to powers of
two. The matrices have the same order as in the paper: EMB > QK > FFN > VO. NORM and HEAD have higher ratios than in the
paper. The base learning rate is that of FFN."""

DEFAULT_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.EMB: 4.0, Block.QK: 2.0, Block.FFN: 1.0, Block.VO: 0.7, Block.NORM: 6.0, Block.HEAD: 4.0}
)
"""The ratios that are used if none are given, also known as "half". They are MEASURED_RATIOS to the power 1/2, rounded,
so half way to uniform on a logarithmic scale. The base learning rate is that of FFN: a tuned uniform learning rate."""


def resolve_ratios(ratios: Ratios) -> dict[Block, float]:
    """Return the ratio of every block; blocks that `ratios` does not name have ratio 1.

    Args:
        ratios: the learning-rate ratio of each block. One of:

            - a mapping from Block, or its string such as "qk", to a number;
            - a key of :data:`NAMED_RATIOS`: "half", "measured", "paper", "uniform" or "quickstart";
            - an object with a ``ratios()`` method: SharpnessReport, DirectionalReport or AutoRule;
            - a sequence of DirectionalReports measured during one run.

    Raises:
        ValueError: the name is unknown, a key is not a block, or a ratio is not a positive finite number.
        TypeError: `ratios` is none of the types above.

    Example:
        >>> resolve_ratios({"qk": 8})[Block.QK], resolve_ratios({})[Block.EMB], resolve_ratios("paper")[Block.EMB]
        (8.0, 1.0, 10.0)
    """
    given = check_block_values(
        given_ratios(ratios),
        "ratios",
        lambda value: math.isfinite(value) and value > 0,
        "a finite number above 0",
    )
    return dict.fromkeys(Block, 1.0) | given


NAMED_RATIOS: Mapping[str, Mapping[Block, float]] = MappingProxyType(
    {
        "uniform": UNIFORM_RATIOS,
        "half": DEFAULT_RATIOS,
        "paper": PAPER_RATIOS,
        "measured": MEASURED_RATIOS,
        "quickstart": QUICKSTART_RATIOS,
    }
)
"""The ratios that can be given by name."""


def given_ratios(ratios: Ratios, *, more: Sequence[str] = ()) -> Mapping[Any, float]:
    """Return the mapping that `ratios` stands for, without adding the blocks that it does not name.

    Args:
        ratios: any value that :func:`resolve_ratios` accepts.
        more: further names that the caller accepts; they are listed in the error message.

    Raises:
        ValueError: the name is unknown (the message lists the names), or it is a file name (the message shows how to
            read the file).
        TypeError: `ratios` is not a mapping, a name or a report.

    Example:
        >>> given_ratios("measured") is MEASURED_RATIOS
        True
    """
    if isinstance(ratios, str):
        return _by_name(ratios, more)
    own = getattr(ratios, "ratios", None)
    if callable(own):  # MeasuredRatios, a mapping, has an attribute `ratios` that is not callable
        return warn_of_undetermined(own())
    if isinstance(ratios, Mapping):
        return ratios
    if isinstance(ratios, Sequence):
        along = getattr(ratios[0], "ratios_of_run", None) if ratios else None
        if along is None:
            what = f"a {type(ratios).__name__}" if ratios else f"an empty {type(ratios).__name__}"
            raise TypeError(f"ratios is {what}; {_EXPECTED}")
        return warn_of_undetermined(along(ratios))
    if isinstance(ratios, os.PathLike):
        raise TypeError(f"ratios is a path, {os.fspath(ratios)}; {_how_to_read(os.fspath(ratios))}")
    raise TypeError(f"ratios is {ratios!r:.60}; {_EXPECTED}")


def warn_of_undetermined(ratios: Mapping[Block, float]) -> Mapping[Block, float]:
    """Return the ratios; warn of the blocks that a measurement along the update does not decide."""
    if undetermined := getattr(ratios, "undetermined", None):
        names = ", ".join(block.value.upper() for block in undetermined)
        warnings.warn(
            f"ratios: this measurement does not determine {names}; expected an error of at most a factor of 2, and "
            "used the ratios of `measured`: measure more checkpoints or more batches (`undetermined` of the ratios "
            "and the output of blockwise-lr sharpness --directional say which)",
            stacklevel=3,
        )
    return ratios


_EXPECTED = (
    'expected a name such as "half", a mapping such as {"emb": 4, "qk": 2}, or a report of a measurement'
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
    """Return the ratios as text, without the blocks whose ratio is 1.

    :func:`blockwise_lr.train.ratio_text.parse_ratios` reads this text back.

    Example:
        >>> spell_ratios(PAPER_RATIOS)
        'emb=10,qk=8,vo=4,ffn=6'
    """
    unequal = {block: ratio for block, ratio in resolve_ratios(ratios).items() if ratio != 1}
    return format_pairs(unequal) or "uniform"


def is_file(text: str) -> bool:
    """Return whether `text` is the path of an existing file. Text too long to be a path is not."""
    try:
        return Path(text).is_file()
    except OSError:  # the text is too long to be a file name
        return False
