"""The rule that ends a clearly lost run before its last step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyEnd:
    """Ends a run whose training loss is far above that of the best finished run at the same steps.

    Both runs have the same initial weights and the same data order, so most of the noise of a batch cancels in the
    difference. A run with a longer warm-up or other ratios can be behind for half of the steps and overtake late. The
    rule therefore does not act before `share` of the run, and only on a gap above `margin`. The defaults ended no
    better run on recorded curves of 320 runs (studies/2026-11-samplers).

    Args:
        share: share of the steps before which no run ends.
        margin: gap in nats above which a run ends.
        rows: number of logged losses over which the gap is averaged.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> rule, best = EarlyEnd(share=0.5, margin=0.5, rows=2), {10: 5.0, 20: 4.0, 30: 3.5}
        >>> rule.lost({10: 5.1, 20: 4.8, 30: 4.3}, best, steps=40), rule.lost({10: 5.3, 20: 4.6}, best, steps=40)
        (True, False)
    """

    share: float = 0.6
    margin: float = 0.4
    rows: int = 3

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.margin > 0 and self.rows >= 1):
            raise ValueError(
                f"{self}: expected a share above 0 and up to 1, a margin above 0, and 1 row or more"
            )

    def gap(self, losses: Mapping[int, float], best: Mapping[int, float]) -> float | None:
        """Return how far a run is above the best one, averaged over the last steps that both have logged.

        Args:
            losses: training loss by step of the run, up to now.
            best: training loss by step of the best finished run.

        Returns:
            The gap in nats, or None if the two have fewer than `rows` steps in common.
        """
        steps = sorted(losses.keys() & best.keys())[-self.rows :]
        if len(steps) < self.rows:
            return None
        return sum(losses[step] - best[step] for step in steps) / self.rows

    def lost(self, losses: Mapping[int, float], best: Mapping[int, float], steps: int) -> bool:
        """Return whether the run ends now.

        Args:
            losses: training loss by step of the run, up to now.
            best: training loss by step of the best finished run; empty if none has finished.
            steps: number of steps of the whole run.
        """
        if not losses or max(losses) < self.share * steps:
            return False
        gap = self.gap(losses, best)
        return gap is not None and gap > self.margin


DEFAULT_RULE = EarlyEnd()
"""The rule of `blockwise-lr tune`."""
