"""The cells and tables that show what a comparison found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
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


def other_settings(arm: Any) -> str:
    """Return what an arm sets besides its model, steps, rate, ratios, warm-up and seed, such as "beta2 0.99"."""
    shown = ("shape", "steps", "base_lr", "ratios", "warmup", "seed")
    usual = {each.name: each.default for each in fields(arm) if each.name not in shown}
    found = {name: getattr(arm, name) for name in usual}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value != usual[name])


def progress(name: str, rules: Iterable[str], chosen: Collection[str]) -> str:
    """Return which rules of a model are tuned, as a sentence.

    Example:
        >>> progress("Mixtral", ("uniform", "half"), {"half"})
        'Mixtral: `half` tuned, `uniform` not yet.'
    """
    every = list(rules)
    parts = []
    for verdict, named in (
        ("tuned", [rule for rule in every if rule in chosen]),
        ("not yet", [rule for rule in every if rule not in chosen]),
    ):
        if named:
            parts.append(f"{', '.join(f'`{rule}`' for rule in named)} {verdict}")
    return f"{name}: {', '.join(parts)}."


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


def speedup_cell(value: float | None, bound: str | None) -> str:
    """A speed-up, marked where it is only a bound.

    Example:
        >>> speedup_cell(1.5, "at_least")
        '>= 1.50x'
    """
    if value is None:
        return "-"
    return {"exact": "", "at_least": ">= ", "at_most": "<= "}[bound or "exact"] + f"{value:.2f}x"


def speedup(found: dict[str, Any]) -> str:
    """The speed-up of a comparison."""
    return speedup_cell(found["value"], found["bound"])


def speedup_of(found: dict[str, Any] | None, kind: str) -> str:
    """The speed-up of a comparison: `kind` is "speedup" (the paper's) or "speedup_decayed"; empty if not run."""
    return "" if found is None or found["loss_gap"]["mean"] is None else speedup(found[kind])
