"""The arms of a comparison: an optimizer with its learning-rate ratios, trained for a horizon."""

from __future__ import annotations

from dataclasses import dataclass

from blockwise_lr.errors import UserError
from blockwise_lr.optimizers.registry import OPTIMIZERS, optimizer_entry
from blockwise_lr.train.ratio_text import canonical_ratios

HORIZONS = {"N/2": 0.5, "N": 1.0, "2N": 2.0, "4N": 4.0}
"""Lengths of a run, in units of the preset's steps N."""


@dataclass(frozen=True)
class Arm:
    """A training set-up to compare: an optimizer and its learning-rate ratios.

    Args:
        name: the name in the report.
        optimizer: a name from the registry, or an import path such as "torch.optim:RAdam".
        ratios: learning-rate ratios, in the form of `--ratios`.
    """

    name: str
    optimizer: str
    ratios: str

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Parse an arm such as "adamw:half" or "name=adamw:half".

        The import path of an optimizer may contain a colon itself: "torch.optim:RAdam:half".

        Args:
            text: OPTIMIZER:RATIOS or NAME=OPTIMIZER:RATIOS. Without NAME, the whole text is the name.

        Raises:
            UserError: the text does not have this form, or the name is empty or has unprintable characters.

        Example:
            >>> Arm.parse("blockwise=adamw:half")
            Arm(name='blockwise', optimizer='adamw', ratios='half')
        """
        head, colon, ratios = text.partition(":")
        name, equals, optimizer = head.rpartition("=")
        attribute, second, remainder = ratios.partition(":")
        if second and optimizer.strip() not in OPTIMIZERS and attribute.strip().isidentifier():
            optimizer, ratios = f"{optimizer.strip()}:{attribute.strip()}", remainder
        name = name.strip() if equals else text.strip()
        arm = cls(name, optimizer.strip(), ratios.strip())
        if not (colon and arm.name and arm.optimizer and arm.ratios) or not arm.name.isprintable():
            raise UserError(
                f"cannot read the arm {text!r}: expected OPTIMIZER:RATIOS or NAME=OPTIMIZER:RATIOS, "
                f"such as adamw:half or blockwise=adamw:half"
            )
        return arm


@dataclass(frozen=True)
class Series:
    """One arm trained for one horizon, over all seeds and learning rates. It is one row of the report.

    Args:
        name: the arm's name, followed by the horizon unless that is N ("adamw:uniform 2N").
        arm: optimizer and ratios.
        horizon: a key of `HORIZONS`.
        steps: number of optimizer steps.
    """

    name: str
    arm: Arm
    horizon: str
    steps: int


def resolve_arm(arm: Arm) -> Arm:
    """Return the arm with a ratios file replaced by its content ("emb=4,vo=0.5").

    The arm then keeps its meaning if the file changes.

    Raises:
        UserError: the optimizer or the ratios are unknown; the message lists the known ones.
    """
    try:
        optimizer_entry(arm.optimizer).load()
        return Arm(arm.name, arm.optimizer, canonical_ratios(arm.ratios))
    except (ValueError, ImportError) as error:
        raise UserError(f"arm {arm.name!r}: {error}") from None
