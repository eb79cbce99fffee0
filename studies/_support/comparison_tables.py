"""The cells and tables that show what a comparison found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def thousands(number: int) -> str:
    """Return a number with its digits in groups of three.

    Example:
        >>> thousands(4800)
        '4 800'
    """
    return f"{number:,}".replace(",", " ")


def comparisons(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By arm: its comparison with the baseline of as many steps."""
    return {each["arm"]: each for each in study["comparisons"]}


def nats_won(found: dict[str, Any] | None) -> str:
    """The loss gap of a comparison with its 95 % interval; empty if the arm was not run."""
    if found is None or found["loss_gap"]["mean"] is None:
        return ""
    gap = found["loss_gap"]
    interval = "" if gap["ci95"] is None else f" ({gap['ci95'][0]:+.3f} to {gap['ci95'][1]:+.3f})"
    return f"{gap['mean']:+.3f}{interval}"


def speedup(found: dict[str, Any]) -> str:
    """A speed-up, marked where it is only a bound."""
    if found["value"] is None:
        return "-"
    return {"exact": "", "at_least": ">= ", "at_most": "<= "}[found["bound"]] + f"{found['value']:.2f}x"


def speedup_of(found: dict[str, Any] | None, kind: str) -> str:
    """The speed-up of a comparison: `kind` is "speedup" (the paper's) or "speedup_decayed"; empty if not run."""
    return "" if found is None or found["loss_gap"]["mean"] is None else speedup(found[kind])
