"""What can be compared: an optimizer with its learning-rate ratios, over a horizon."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import resolve_ratios

OPTIMIZERS = ("adamw",)
"""Names that an arm's optimizer may have."""

RATIOS = ("uniform", "paper", "quickstart")
"""Names that an arm's ratios may have, beside files."""

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

        Raises:
            UserError: the text is not of this form, or the name is empty or holds unprintable characters.

        Example:
            >>> Arm.parse("blockwise=adamw:paper")
            Arm(name='blockwise', optimizer='adamw', ratios='paper')
        """
        head, colon, ratios = text.partition(":")
        name, equals, optimizer = head.rpartition("=")
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


def read_ratios(arm: Arm) -> dict[str, float]:
    """Ratio of each block in an arm's file of ratios.

    Raises:
        UserError: there is no such file, or it holds no ratios.
    """
    path = Path(arm.ratios)
    if path.suffix != ".json" or not path.is_file():
        raise UserError(
            f"arm {arm.name!r}: unknown ratios {arm.ratios!r}; expected {', '.join(RATIOS)}, "
            f"or an existing .json file of {{block: ratio}}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected an object {{block: ratio}}, got {type(values).__name__}")
        resolve_ratios(values)
    except ValueError as error:
        raise UserError(f"arm {arm.name!r}: {path} holds no ratios: {error}") from None
    return values
