"""A comparison's numbers in sentences: the same in the report, in compare.json and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockwise_lr.compare.speedup import ALL_EQUAL, DIVERGED

ONE_SEED = "One seed: cannot tell noise from effect"

_SIGNS = {"exact": "", "at_least": "at least ", "at_most": "at most "}
_SYMBOLS = {"exact": "", "at_least": "≥ ", "at_most": "≤ "}


def format_loss(value: float | None) -> str:
    """A loss in a table; None is a diverged run."""
    return "diverged" if value is None else f"{value:.4f}"


def format_signed(value: float | None, digits: int = 4) -> str:
    """A loss gap in a table, with a proper minus sign."""
    return "undefined" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def format_interval(ci95: Sequence[float] | None, digits: int = 4, signed: bool = False) -> str:
    """A confidence interval in a table; a dash where there is none."""
    if ci95 is None:
        return "–"
    sign = "+" if signed else ""
    low, high = (f"{value:{sign}.{digits}f}".replace("-", "−") for value in ci95)
    return f"{low} to {high}"


def format_speedup(speedup: Mapping[str, Any], words: bool = False) -> str:
    """A speed-up: "1.72×", "≥ 2.00×", in words "at least 2.00×"; "undefined" where it has no value.

    In words with the reason, but for a diverged run, which the report names elsewhere.
    """
    if speedup["value"] is None:
        reason = speedup.get("reason", DIVERGED)
        return f"undefined, since {reason}," if words and not reason.startswith(DIVERGED) else "undefined"
    sign = (_SIGNS if words else _SYMBOLS)[speedup["bound"]]
    return f"{sign}{speedup['value']:.2f}×"


def format_p_value(p_value: float | None) -> str:
    """A p-value in a table."""
    if p_value is None:
        return "–"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def is_tuned(content: Mapping[str, Any], series: str) -> bool:
    """Whether a series may be called tuned: at the edge of the grid, its optimum may lie outside."""
    return bool(content["tuned"]) and series not in content.get("at_edge", ())


def statement(comparison: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """One comparison in a sentence or two, negative results as plainly as positive ones."""
    arm, against, gap = comparison["arm"], comparison["against"], comparison["loss_gap"]
    baseline = f"tuned {against}" if is_tuned(content, against) else against
    seeds, steps = len(content["seeds"]), content["steps"]
    if gap["mean"] is None:
        return _diverged_statement(comparison, content)
    size = f"{abs(gap['mean']):.3f} nats"
    if seeds == 1:
        side = "below" if gap["mean"] > 0 else "above"
        first = f"{arm} ends {size} {side} {baseline} after {steps:,} steps. {ONE_SEED}."
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
    # The measure's own zero point: without it a reader takes any number above 1 for a gain.
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
    """The report's first sentences: one for each arm, the lowest loss first, diverged arms last."""

    def rank(comparison: Mapping[str, Any]) -> float:
        mean = comparison["loss_gap"]["mean"]
        return float("inf") if mean is None else -float(mean)

    return [str(comparison["statement"]) for comparison in sorted(content["comparisons"], key=rank)]
