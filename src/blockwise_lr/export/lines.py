"""The parts that exported files have in common: numbers, quotes, and the comment at the top."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable

from blockwise_lr.errors import UserError
from blockwise_lr.export.rates import RateGroup, Rates

_WIDTH = 98


def number(value: float) -> str:
    """Return a number with at most 12 digits, as Python and YAML read it.

    YAML 1.1 reads 1e-05 as text, so an exponent always follows a decimal point.

    Example:
        >>> number(8.0), number(1e-5), number(0.1 * 3)
        ('8', '1.0e-05', '0.3')
    """
    text = f"{value:.12g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text


def header(rates: Rates, target: str) -> list[str]:
    """Return the comment at the top: what the file is for, whose names it holds, and what is lost."""
    ratios = ", ".join(f"{label} {number(ratio)}" for label, ratio in ratios_by_label(rates).items())
    lines = [
        *_wrapped(f"Learning rates by block for {target}, written by blockwise-lr export."),
        *_wrapped(f"Ratios to the base learning rate: {ratios}."),
        *_wrapped(f"Parameter names: {rates.naming}. Checked: every parameter gets the rate of its block."),
    ]
    for each in rates.lost:
        lines += _wrapped(f"Lost: {each}.")
    return lines


def ratios_by_label(rates: Rates) -> dict[str, float]:
    """Return the ratio of each group: {label: ratio}."""
    return {group.label: group.lr_ratio for group in rates.groups}


def needed_lr(rates: Rates, target: str) -> float:
    """Return the base learning rate, for targets whose rates are absolute.

    Raises:
        UserError: there is none.
    """
    if rates.lr is None:
        raise UserError(
            f"{target} takes absolute learning rates, and no base learning rate was given: "
            "add --lr, such as --lr 6e-4 (in Python lr=6e-4), with the uniform learning rate that you use now"
        )
    return rates.lr


def times(group: RateGroup, variable: str = "LR") -> str:
    """Return the learning rate of a group as a Python expression, such as "8 * LR"."""
    return variable if group.lr_ratio == 1 else f"{number(group.lr_ratio)} * {variable}"


def raw(pattern: str) -> str:
    """Return a regular expression as a string of Python: a raw one, unless it has quotes."""
    return literal(pattern) if '"' in pattern else f'r"{pattern}"'


def literal(text: str) -> str:
    """Return text as a string of Python in double quotes.

    Example:
        >>> print(literal("*.norm.*"), literal('a"b'))
        "*.norm.*" "a\\"b"
    """
    return json.dumps(text, ensure_ascii=False)


def quoted(pattern: str) -> str:
    """Return text as a string of YAML in single quotes, inside of which a backslash is plain."""
    return "'" + pattern.replace("'", "''") + "'"


def _wrapped(text: str) -> Iterable[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
