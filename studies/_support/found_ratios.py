"""The best ratios of a search, with how far each can move for a hundredth of a nat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from arms import Arm
from tuning import Results, point_of

from blockwise_lr.tune.space import Point, Space
from blockwise_lr.tune.valley import Valley, fit_valleys

_NOISE = 0.005  # nats: how much a seed moves one arm more than another


@dataclass(frozen=True)
class Found:
    """The best point of a search, with the valley of each block around it."""

    best: Point
    valleys: dict[str, Valley]

    def ratio(self, block: str) -> tuple[float, tuple[float, float] | None]:
        """Return the block's ratio and between which ratios the loss stays within 0.01 nats; None: not known."""
        value = self.best.ratios.get(block, 1.0)
        moves = self.valleys[block].moves
        return value, None if moves is None else (value * 2 ** moves[0], value * 2 ** moves[1])

    def cell(self, block: str) -> str:
        """Return the ratio and its valley for a table."""
        value, between = self.ratio(block)
        width = "not decided" if between is None else f"{between[0]:.2g} to {between[1]:.2g}"
        return f"{value:.2g} ({width})"


def found_ratios(best: Arm, arms: Iterable[Arm], space: Space, results: Results) -> Found:
    """Return the best arm of a search with its valleys, fitted to all arms that have ended."""
    losses = {arm.name: loss for arm in arms if (loss := results.loss(arm)) is not None}
    points = {arm.name: point_of(arm, space) for arm in arms if arm.name in losses}
    centre = point_of(best, space)
    valleys = fit_valleys(space, list(points.values()), [losses[n] for n in points], centre, noise=_NOISE)
    return Found(centre, valleys)
