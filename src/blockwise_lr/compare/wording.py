"""The sentences about a comparison in the report, in compare.json and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockwise_lr.compare.over_seeds import ALL_EQUAL
from blockwise_lr.compare.speedup import DIVERGED

ONE_SEED = "One seed cannot separate an effect from noise."

_SIGNS = {"exact": "", "at_least": "at least ", "at_most": "at most "}
_SYMBOLS = {"exact": "", "at_least": "≥ ", "at_most": "≤ "}


def format_loss(value: float | None) -> str:
    """Format a loss for a table; None stands for a diverged run."""
    return "diverged" if value is None else f"{value:.4f}"


def format_signed(value: float | None, digits: int = 4) -> str:
    """Format a loss gap for a table, with a typographic minus sign."""
    return "undefined" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def format_interval(ci95: Sequence[float] | None, digits: int = 4, signed: bool = False) -> str:
    """Format a confidence interval for a table; None becomes a dash."""
    if ci95 is None:
        return "–"
    sign = "+" if signed else ""
    low, high = (f"{value:{sign}.{digits}f}".replace("-", "−") for value in ci95)
    return f"{low} to {high}"


def format_speedup(speedup: Mapping[str, Any], words: bool = False) -> str:
    """Format a speed-up: "1.72×", "≥ 2.00×", or "undefined" if it has no value.

    Args:
        speedup: a speed-up of compare.json.
        words: write "at least" for "≥" and add the reason for an undefined value. A diverged run is not given as a
            reason, because the report names diverged runs elsewhere.
    """
    if speedup["value"] is None:
        reason = speedup.get("reason", DIVERGED)
        return f"undefined, since {reason}," if words and not reason.startswith(DIVERGED) else "undefined"
    sign = (_SIGNS if words else _SYMBOLS)[speedup["bound"]]
    return f"{sign}{speedup['value']:.2f}×"


def format_p_value(p_value: float | None) -> str:
    """Format a p-value for a table."""
    if p_value is None:
        return "–"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def is_tuned(content: Mapping[str, Any], series: str) -> bool:
    """Return whether a series is tuned. At the edge of the grid it is not, since its optimum may be outside."""
    return bool(content["tuned"]) and series not in content.get("at_edge", ())


def statement(comparison: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Return one or two sentences about a comparison, as plain about a negative result as about a positive one."""
    arm, against, gap = comparison["arm"], comparison["against"], comparison["loss_gap"]
    baseline = f"tuned {against}" if is_tuned(content, against) else against
    seeds, steps = len(content["seeds"]), content["steps"]
    if gap["mean"] is None:
        return _diverged_statement(comparison, content)
    size = f"{abs(gap['mean']):.3f} nats"
    if seeds == 1:
        side = "below" if gap["mean"] > 0 else "above"
        first = f"{arm} ends {size} {side} {baseline} after {steps:,} steps, with one seed."
    elif gap["significant"] is None:
        side = "below" if gap["mean"] > 0 else "above"
        first = (
            f"{arm} ends {size} {side} {baseline} after {steps:,} steps. No interval for {seeds} seeds: "
            f"{gap.get('reason', ALL_EQUAL)}."
        )
    elif not gap["significant"]:
        first = (
            f"{arm} and {baseline} cannot be told apart after {steps:,} steps: loss gap "
            f"{format_signed(gap['mean'])} nats (95 % CI {format_interval(gap['ci95'], signed=True)}, "
            f"p = {format_p_value(gap['p_value'])}, {seeds} seeds)."
        )
    else:
        verb = "beats" if gap["mean"] > 0 else "LOSES to"
        bounds = sorted(abs(value) for value in gap["ci95"])
        first = (
            f"{arm} {verb} {baseline} by {size} after {steps:,} steps (95 % CI {format_interval(bounds, 3)}, "
            f"{seeds} seeds; significant at 5 %)."
        )
    return f"{first} {_speedup_sentence(comparison, content)}"


def _speedup_sentence(comparison: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    itself = content["baseline_against_itself"]
    # The baseline's own score is the reference; without it, any value above 1 would look like a gain.
    reference = f" (the baseline against itself: {format_speedup(itself, words=True)})"
    return (
        f"Speed-up: {format_speedup(comparison['speedup'], words=True)} by the paper's measure"
        f"{reference if itself['value'] is not None else ''}; "
        f"{format_speedup(comparison['speedup_decayed'], words=True)} between fully decayed runs."
    )


def _diverged_statement(comparison: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    total = len(content["seeds"])
    parts = [
        f"{name} diverged with {'its only seed' if total == 1 else f'{len(seeds)} of {total} seeds'}"
        for name, seeds in comparison["diverged"].items()
    ]
    return (
        f"{'; '.join(parts)}: {comparison['arm']} against {comparison['against']} has no loss gap to report."
    )


def answer(content: Mapping[str, Any]) -> list[str]:
    """Return the first sentences of the report: one per arm, the best arm first, diverged arms last.

    With one seed, a last sentence says once what holds for every arm.
    """

    def rank(comparison: Mapping[str, Any]) -> float:
        mean = comparison["loss_gap"]["mean"]
        return float("inf") if mean is None else -float(mean)

    ranked = sorted(content["comparisons"], key=rank)
    found = [str(comparison["statement"]) for comparison in ranked]
    if len(content["seeds"]) == 1 and ranked[0]["loss_gap"]["mean"] is not None:
        found.append(ONE_SEED)
    return found
