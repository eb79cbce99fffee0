"""Parse and spell ratios as text: a name, pairs, or a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwise_lr.blocks import Block
from blockwise_lr.directional.directional_report import KIND as DIRECTIONAL
from blockwise_lr.directional.directional_report import DirectionalReport, reports_of
from blockwise_lr.integrations.moving_ratios import MOVING_NAMES, MovingRule, moving_rule
from blockwise_lr.optim.block_values import parse_pairs
from blockwise_lr.optim.ratios import (
    NAMED_RATIOS,
    is_file,
    resolve_ratios,
    spell_ratios,
    warn_of_undetermined,
)
from blockwise_lr.sharpness import SharpnessReport


def parse_ratios(text: str) -> dict[Block, float]:
    """Parse ratios from a name ("half"), from ``block=ratio`` pairs ("emb=4,vo=0.5"), or from a JSON file.

    Args:
        text: a name, pairs, or the path of a file. For "auto", the result is the ratios that a run starts with;
            :func:`parse_moving` reads the rule. A file holds ``{"emb": 4, ...}``, a SharpnessReport (sharpness.json) or
            DirectionalReports (directional.json), all of which are used.

    Returns:
        The ratios of the named blocks; :func:`resolve_ratios` adds the others.

    Raises:
        ValueError: `text` is none of the three, the file holds other JSON, a block is unknown, or a ratio is not
            above 0.

    Example:
        >>> parse_ratios("emb=4,vo=0.5")[Block.VO]
        0.5
    """
    if text in NAMED_RATIOS:
        return dict(NAMED_RATIOS[text])
    if (rule := moving_rule(text)) is not None:
        return dict(rule.ratios())
    if is_file(text):
        try:
            values = json.loads(Path(text).read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(
                f'ratios: {text} is not JSON ({error}); expected {{"emb": 4, "qk": 2, ...}}'
            ) from None
        if not isinstance(values, dict):
            raise ValueError(
                f'ratios: {text} holds {type(values).__name__}; expected {{"emb": 4, "qk": 2, ...}}'
            )
        measured = "estimator" in values or values.get("kind") == DIRECTIONAL
        return _from_report(text, values) if measured else _named(values)
    if "=" not in text:
        raise ValueError(
            f"ratios: {text!r} is no file and none of {', '.join((*NAMED_RATIOS, *MOVING_NAMES))}; "
            f'expected one of these, a JSON file, or pairs such as "emb=4,vo=0.5"'
        )
    return _named(parse_pairs(text, "ratios"))


def canonical_ratios(text: str) -> str:
    """Return the canonical spelling of ratios. The contents of a file replace its path.

    Raises:
        ValueError: `text` cannot be parsed, as in :func:`parse_ratios`.

    Example:
        >>> canonical_ratios("vo=.5"), canonical_ratios("paper"), canonical_ratios("auto")
        ('vo=0.5', 'paper', 'auto')
    """
    return text if is_named(text) else spell_ratios(parse_ratios(text))


def is_named(text: str) -> bool:
    """Return whether the text is a name, of fixed ratios or of a rule that changes them during the run."""
    return text in NAMED_RATIOS or moving_rule(text) is not None


def parse_moving(text: str, re_measure: int = 0) -> MovingRule | None:
    """Parse the rule that changes the ratios during the run; None for fixed ratios.

    Args:
        text: ratios, as for :func:`parse_ratios`.
        re_measure: replaces the rule's own `re_measure`, unless it is 0. Only such a rule can have it.

    Raises:
        ValueError: a setting of the rule is unknown or out of range, or `re_measure` is given with fixed ratios.

    Example:
        >>> parse_moving("auto:stop=0.25", re_measure=100).re_measure, parse_moving("paper")
        (100, None)
    """
    rule = moving_rule(text)
    if re_measure < 0 or (re_measure and rule is None):
        raise ValueError(
            f"--re-measure is {re_measure} with --ratios {text}; expected 0, or a number of steps "
            f"with --ratios {' or '.join(MOVING_NAMES)}"
        )
    return replace(rule, re_measure=re_measure) if rule is not None and re_measure else rule


def _from_report(path: str, values: Mapping[str, Any]) -> dict[Block, float]:
    try:
        if values.get("kind") != DIRECTIONAL:
            return dict(SharpnessReport.from_dict(values).ratios())
        ratios = DirectionalReport.ratios_of_run(reports_of(values))
    except ValueError as error:
        raise ValueError(f"ratios: {path}: {error}") from None
    warn_of_undetermined(ratios)
    return dict(ratios)


def _named(values: Mapping[str, float]) -> dict[Block, float]:
    resolved = resolve_ratios(values)
    return {Block(name): resolved[Block(name)] for name in values}
