"""Ratios that change during a run: the rule that `ratios` stands for, and its work in a trainer.

No other module outside ``experimental`` refers to the classes there: trainers, checkpoints and configurations know the
names that are defined here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from blockwise_lr.experimental import AutoRatios, AutoRule
from blockwise_lr.experimental.auto_rule import NAME, parse_auto
from blockwise_lr.optim import BlockwiseSchedule, Ratios

MovingRule: TypeAlias = AutoRule
"""A rule that changes ratios during a run. Its ``ratios()`` are those that the run starts with."""

RatioMover: TypeAlias = AutoRatios
"""Applies a rule to an optimizer. Its state is in the optimizer's groups, so it is saved and loaded with them."""

MOVING_NAMES = (NAME,)
"""The names of ratios that change during a run. :data:`blockwise_lr.optim.ratios.NAMED_RATIOS` has the fixed ones."""


def moving_rule(ratios: Ratios) -> MovingRule | None:
    """Return the rule that changes the ratios during a run, or None for fixed ratios.

    Args:
        ratios: the name of a rule, optionally with settings ("auto:gain=5"), a rule, or any fixed ratios.

    Raises:
        ValueError: a setting after the name is unknown or out of range.

    Example:
        >>> moving_rule("auto:stop=0.25").stop, moving_rule("paper")
        (0.25, None)
    """
    rule = parse_auto(ratios) if isinstance(ratios, str) else ratios
    return rule if isinstance(rule, MovingRule) else None


class MovingRatios:
    """Moves the ratios of a trainer's optimizer by a rule, and reports the loss of each step to the rule's guard.

    Args:
        rule: how the ratios change.
    """

    def __init__(self, rule: MovingRule) -> None:
        self.rule = rule
        self.mover: RatioMover | None = None
        """The object that changes the ratios; None before :meth:`start`."""
        self._step_loss: Tensor | None = None  # sum over the micro-batches of the current step

    def start(self, schedule: BlockwiseSchedule) -> None:
        """Change the ratios of the schedule's optimizer from now on."""
        self._step_loss = None
        self.mover = RatioMover(schedule.optimizer, schedule, self.rule)

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, already divided by the number of micro-batches or by the tokens of all."""
        if self.mover is not None:
            self._step_loss = loss if self._step_loss is None else self._step_loss + loss

    def end_step(self, step: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Report the loss of a step to the guard, if the guard needs it.

        Args:
            step: number of updates before this one.
            mean: averages a tensor over the processes.
        """
        loss, self._step_loss = self._step_loss, None
        if self.mover is not None and loss is not None and self.mover.guards(step):
            self.mover.watch(float(mean(loss)))

    def logged(self) -> dict[str, float]:
        """Return the current ratios as entries of a log, ``ratio/<block>``."""
        ratios = {} if self.mover is None else self.mover.ratios
        return {f"ratio/{block.value}": ratio for block, ratio in ratios.items()}

    def stop(self) -> None:
        """Leave the ratios as they are from now on; they remain readable."""
        if self.mover is not None:
            self.mover.close()
