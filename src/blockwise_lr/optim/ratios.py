"""How much faster than the base learning rate each block learns."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from blockwise_lr.blocks import Block
from blockwise_lr.optim.auto_rule import AutoRule, parse_auto
from blockwise_lr.optim.by_block import check_by_block, parse_pairs, spell_pairs
from blockwise_lr.optim.directional_report import KIND as DIRECTIONAL
from blockwise_lr.optim.directional_report import DirectionalReport
from blockwise_lr.optim.measured import ratios_from_sharpness
from blockwise_lr.optim.trajectory import reports_of
from blockwise_lr.sharpness import SharpnessReport

Ratios = (
    Mapping[Block, float]
    | Mapping[str, float]
    | SharpnessReport
    | DirectionalReport
    | Sequence[DirectionalReport]
    | AutoRule
    | str
)

UnnamedRatios = (
    Mapping[Block, float]
    | Mapping[str, float]
    | SharpnessReport
    | DirectionalReport
    | Sequence[DirectionalReport]
    | AutoRule
)

PAPER_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.NORM: 1.0, Block.VO: 4.0, Block.FFN: 6.0, Block.QK: 8.0, Block.EMB: 10.0}
)
"""The paper's ratios, tuned by its authors on LLaMA 0.25B and MiniPile (METHOD section 3). Blocks that are
not named, the untied output head among them, have ratio 1."""

UNIFORM_RATIOS: Mapping[Block, float] = MappingProxyType({})
"""Every block at the base learning rate: plain AdamW, the baseline."""

QUICKSTART_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.VO: 0.1, Block.NORM: 8.0, Block.EMB: 8.0, Block.HEAD: 8.0}
)
"""Ratios searched for the quickstart's small model and text (benchmarks/tune_quickstart.py); not meant for others."""

MEASURED_RATIOS: Mapping[Block, float] = MappingProxyType(
    {Block.EMB: 16.0, Block.QK: 4.0, Block.FFN: 1.0, Block.VO: 0.5, Block.NORM: 32.0, Block.HEAD: 16.0}
)
"""Ratios measured along two uniform runs of the quickstart's model (results/ratios/along), in powers of two: the
paper's order among the matrices, EMB > QK > FFN > VO, with NORM and HEAD fast. The base learning rate is FFN's."""


def resolve_ratios(ratios: Ratios) -> dict[Block, float]:
    """A ratio for every block: those given, and 1 for the rest.

    Args:
        ratios: learning-rate ratio by block; keys are Blocks or their strings ("qk"). A SharpnessReport, a
            DirectionalReport or a sequence of these stands for ``ratios_from_sharpness(report)``,
            an AutoRule for those it begins with, and a name of :data:`NAMED_RATIOS` ("paper", "measured",
            "uniform", "quickstart") for those.

    Raises:
        ValueError: an unknown name, a key that is no block, or a ratio that is not a positive finite number.
        TypeError: neither a mapping nor any of the others.

    Example:
        >>> resolve_ratios({"qk": 8})[Block.QK], resolve_ratios({})[Block.EMB], resolve_ratios("paper")[Block.EMB]
        (8.0, 1.0, 10.0)
    """
    found = named_ratios(ratios)
    if isinstance(found, (SharpnessReport, DirectionalReport, Sequence)):
        found = ratios_from_sharpness(found)
    elif isinstance(found, AutoRule):
        found = starting_ratios(found)
    given = check_by_block(
        found, "ratios", lambda value: math.isfinite(value) and value > 0, "a finite number above 0"
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
"""The ratios that command lines know by name."""


def named_ratios(ratios: Ratios, *, auto: bool = False) -> UnnamedRatios:
    """The ratios that a name stands for; ratios of any other kind as they are.

    Args:
        ratios: as :func:`resolve_ratios` takes them.
        auto: whether "auto" is a name too, for a rule that moves the ratios in the run.

    Raises:
        ValueError: no such name; lists the names, and says how to read a file.
        TypeError: neither a mapping nor a report nor a rule.

    Example:
        >>> named_ratios("measured") is MEASURED_RATIOS
        True
    """
    if isinstance(ratios, str):
        return _by_name(ratios, auto=auto)
    if isinstance(ratios, Sequence) and ratios and not isinstance(ratios[0], DirectionalReport):
        raise TypeError(f"ratios is a {type(ratios).__name__}; {_EXPECTED}")
    if not isinstance(ratios, (Mapping, Sequence, SharpnessReport, DirectionalReport, AutoRule)):
        if isinstance(ratios, os.PathLike):
            raise TypeError(f"ratios is a path, {os.fspath(ratios)}; {_how_to_read(os.fspath(ratios))}")
        raise TypeError(f"ratios is {ratios!r:.60}; {_EXPECTED}")
    return cast("UnnamedRatios", ratios)  # str is a Sequence to mypy


_EXPECTED = (
    'expected a name such as "paper", a mapping such as {"emb": 10, "qk": 8}, or a report of a measurement'
)


def _by_name(text: str, *, auto: bool) -> UnnamedRatios:
    if text in NAMED_RATIOS:
        return NAMED_RATIOS[text]
    names = ", ".join(map(repr, NAMED_RATIOS))
    rule = parse_auto(text)
    if rule is not None and auto:
        return rule
    if rule is not None:
        raise ValueError(
            f"ratios is {text!r}, ratios that move in the run: give them to BlockwiseTrainer, or in a loop of your own "
            "use ratios=AutoRule() and AutoRatios(optimizer, schedule, AutoRule()); expected a name that stands for "
            f"fixed ones ({names})"
        )
    if text.endswith(".json") or _is_file(text):
        raise ValueError(f"ratios is {text!r}, the name of a file; {_how_to_read(text)}")
    if "=" in text:
        raise ValueError(f'ratios is {text!r}; expected a mapping here, such as {{"emb": 4, "vo": 0.5}}')
    also = ', "auto"' if auto else ""
    raise ValueError(
        f"ratios is {text!r}; the names are {names.replace(chr(39), chr(34))}{also}; {_EXPECTED}"
    )


def _how_to_read(path: str) -> str:
    return (
        f"read it first: ratios=json.load(open({path!r})) for {{block: ratio}}, or "
        f"ratios=SharpnessReport.from_json({path!r}) or DirectionalReport.from_json({path!r}) for a measurement"
    )


def starting_ratios(rule: AutoRule) -> Mapping[Block, float]:
    """The ratios that a run by the rule begins with."""
    return MEASURED_RATIOS if rule.begin == "measured" else UNIFORM_RATIOS


def parse_ratios(text: str) -> dict[Block, float]:
    """Ratios from a name ("paper"), from ``block=ratio`` pairs ("emb=4,vo=0.5"), or from a JSON file.

    Args:
        text: name (of "auto", what it begins with; its rule is for :func:`blockwise_lr.optim.auto_rule.parse_auto`),
            pairs, or the path of a file that holds ``{"emb": 4, ...}``, a SharpnessReport (sharpness.json) or
            DirectionalReports (directional.json: all that are in it).

    Returns:
        The ratios of the blocks that are named; :func:`resolve_ratios` adds the others.

    Raises:
        ValueError: none of the three; a file that is not such JSON; an unknown block or a ratio not above 0.

    Example:
        >>> parse_ratios("emb=4,vo=0.5")[Block.VO]
        0.5
    """
    if text in NAMED_RATIOS:
        return dict(NAMED_RATIOS[text])
    if (rule := parse_auto(text)) is not None:
        return dict(starting_ratios(rule))
    if _is_file(text):
        try:
            values = json.loads(Path(text).read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(
                f'ratios: {text} is not JSON ({error}); expected {{"emb": 10, "qk": 8, ...}}'
            ) from None
        if not isinstance(values, dict):
            raise ValueError(
                f'ratios: {text} holds {type(values).__name__}; expected {{"emb": 10, "qk": 8, ...}}'
            )
        measured = "estimator" in values or values.get("kind") == DIRECTIONAL
        return dict(ratios_from_sharpness(_report(text, values))) if measured else _named(values)
    if "=" not in text:
        raise ValueError(
            f"ratios: {text!r} is no file and none of {', '.join(NAMED_RATIOS)}, auto; "
            f'expected one of these, a JSON file, or pairs such as "emb=4,vo=0.5"'
        )
    return _named(parse_pairs(text, "ratios"))


def canonical_ratios(text: str) -> str:
    """The same ratios, spelled so that they mean the same on every reading: a file by what is in it.

    Raises:
        ValueError: as :func:`parse_ratios`.

    Example:
        >>> canonical_ratios("vo=.5"), canonical_ratios("paper"), canonical_ratios("auto")
        ('vo=0.5', 'paper', 'auto')
    """
    by_name = text in NAMED_RATIOS or parse_auto(text) is not None
    return text if by_name else spell_ratios(parse_ratios(text))


def spell_ratios(ratios: Ratios) -> str:
    """The inverse of :func:`parse_ratios`, without the blocks whose ratio is 1.

    Example:
        >>> spell_ratios(PAPER_RATIOS)
        'emb=10,qk=8,vo=4,ffn=6'
    """
    unequal = {block: ratio for block, ratio in resolve_ratios(ratios).items() if ratio != 1}
    return spell_pairs(unequal) or "uniform"


def _report(
    path: str, values: Mapping[str, Any]
) -> SharpnessReport | DirectionalReport | list[DirectionalReport]:
    try:
        if values.get("kind") != DIRECTIONAL:
            return SharpnessReport.from_dict(values)
        reports = reports_of(values)
        return reports if len(reports) > 1 else reports[0]
    except ValueError as error:
        raise ValueError(f"ratios: {path}: {error}") from None


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # many pairs are no file name: too long
        return False


def _named(values: Mapping[str, float]) -> dict[Block, float]:
    resolved = resolve_ratios(values)
    return {Block(name): resolved[Block(name)] for name in values}
