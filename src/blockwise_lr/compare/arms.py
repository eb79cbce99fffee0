"""What can be compared: an optimizer with its learning-rate ratios, over a horizon."""

from __future__ import annotations

from dataclasses import dataclass

from blockwise_lr.errors import UserError
from blockwise_lr.optimizers.registry import OPTIMIZERS, optimizer_entry
from blockwise_lr.train.ratio_text import canonical_ratios

HORIZONS = {"N/2": 0.5, "N": 1.0, "2N": 2.0, "4N": 4.0}
"""Lengths of a run, in units of the preset's steps N."""


@dataclass(frozen=True)
class Arm:
    """One of the things compared: an optimizer and its learning-rate ratios, under a name."""

    name: str
    optimizer: str
    ratios: str

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read "adamw:paper", or "name=adamw:paper"; without a name, the text is the name.

        An optimizer by its import path has a colon of its own: "torch.optim:RAdam:paper".

        Raises:
            UserError: the text is not of this form, or the name is empty or holds unprintable characters.

        Example:
            >>> Arm.parse("blockwise=adamw:paper")
            Arm(name='blockwise', optimizer='adamw', ratios='paper')
        """
        head, colon, ratios = text.partition(":")
        name, equals, optimizer = head.rpartition("=")
        attribute, second, behind = ratios.partition(":")
        if second and optimizer.strip() not in OPTIMIZERS and attribute.strip().isidentifier():
            optimizer, ratios = f"{optimizer.strip()}:{attribute.strip()}", behind
        name = name.strip() if equals else text.strip()
        arm = cls(name, optimizer.strip(), ratios.strip())
        if not (colon and arm.name and arm.optimizer and arm.ratios) or not arm.name.isprintable():
            raise UserError(
                f"cannot read the arm {text!r}: expected OPTIMIZER:RATIOS or NAME=OPTIMIZER:RATIOS, "
                f"such as adamw:paper or blockwise=adamw:paper"
            )
        return arm


@dataclass(frozen=True)
class Series:
    """One arm trained for one horizon, whatever the seed and learning rate: a row of the report.

    Args:
        name: the arm's name; with the horizon behind it if that is not N ("adamw:uniform 2N").
        arm: optimizer and ratios.
        horizon: a key of `HORIZONS`.
        steps: its optimizer steps.
    """

    name: str
    arm: Arm
    horizon: str
    steps: int


def resolve_arm(arm: Arm) -> Arm:
    """The arm with a file of ratios spelled out ("emb=4,vo=0.5"), so that it means the same on every reading.

    Raises:
        UserError: the optimizer or the ratios are unknown (with the known ones), before hours of other runs.
    """
    try:
        optimizer_entry(arm.optimizer).load()
        return Arm(arm.name, arm.optimizer, canonical_ratios(arm.ratios))
    except (ValueError, ImportError) as error:
        raise UserError(f"arm {arm.name!r}: {error}") from None
