"""AutoRule: the settings of AutoRatios, as an object and as text on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from blockwise_lr.blocks import Block
from blockwise_lr.optim.ratios import MEASURED_RATIOS, UNIFORM_RATIOS

NAME = "auto"
Begin = Literal["measured", "uniform"]
Signal = Literal["consistency", "cosine"]
Anchor = Literal["ffn", "mean"]
_CHOICES = {"begin": Begin, "signal": Signal, "anchor": Anchor}


@dataclass(frozen=True)
class AutoRule:
    """The settings of :class:`AutoRatios`. The defaults are meant for every model and need no search.

    Args:
        begin: the initial ratios: "measured" (``MEASURED_RATIOS``, from uniform runs of a small model) or "uniform".
        gain: growth of the log ratio over a whole run, for a block whose updates always agree with the next gradient.
            It assumes that the updates of the anchor agree half of the time.
        signal: "consistency", the mean cosine divided by its root mean square, which gives blocks with noisy gradients
            the same weight as others; or "cosine", the cosine itself.
        start: fraction of the run at which the ratios begin to change.
        stop: fraction of the run at which the ratios stop changing.
        anchor: the reference, whose ratio does not change. "ffn": FFN, or the largest block if there is no FFN. The
            base learning rate is that of this block. "mean": the geometric mean of all blocks.
        measurements: approximate number of measurements in a whole run, at most one per step. The guard reads the loss
            equally often.
        re_measure: number of steps between measurements after `stop`. 0: no such measurements.
        low, high: bounds of a ratio.
        guard: rise of the smoothed training loss above its minimum, in nats, at which the ratios are reduced.

    Raises:
        ValueError: a value is out of range. The message names the setting.
    """

    begin: Begin = "measured"
    gain: float = 3.0
    signal: Signal = "consistency"
    start: float = 0.02
    stop: float = 0.5
    anchor: Anchor = "ffn"
    measurements: int = 1000
    re_measure: int = 0
    low: float = 0.01
    high: float = 100.0
    guard: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gain) and self.gain > 0):
            raise ValueError(f"auto: gain is {self.gain}; expected a finite number above 0")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"auto: start is {self.start:g} and stop {self.stop:g}; expected 0 <= start < stop <= 1"
            )
        for name, kind in _CHOICES.items():
            if (given := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"auto: {name} is {given!r}; expected {' or '.join(get_args(kind))}")
        if self.measurements < 1:
            raise ValueError(f"auto: measurements is {self.measurements}; expected 1 or more")
        if self.re_measure < 0:
            raise ValueError(f"auto: re_measure is {self.re_measure}; expected 0 or more")
        if not self.guard > 0:
            raise ValueError(f"auto: guard is {self.guard:g}; expected a number of nats above 0")
        if not 0 < self.low < 1 < self.high:
            raise ValueError(f"auto: low is {self.low:g} and high {self.high:g}; expected 0 < low < 1 < high")

    def ratios(self) -> Mapping[Block, float]:
        """Return the initial ratios of a run with this rule."""
        return MEASURED_RATIOS if self.begin == "measured" else UNIFORM_RATIOS


def parse_auto(text: str) -> AutoRule | None:
    """Return the rule that text such as "auto" or "auto:gain=100,stop=0.5" describes; None for other text.

    Raises:
        ValueError: an option is unknown, or a value is out of range.

    Example:
        >>> parse_auto("auto:stop=0.5").stop, parse_auto("paper")
        (0.5, None)
    """
    name, colon, options = text.partition(":")
    if name != NAME:
        return None
    known = {field.name: field.type for field in fields(AutoRule)}
    values: dict[str, Any] = {}
    for pair in options.split(",") if colon else []:
        key, _, value = pair.partition("=")
        if key not in known:
            raise ValueError(f"auto: no option {key!r}; there are {', '.join(known)}")
        try:
            read = str if key in _CHOICES else int if known[key] == "int" else float
            values[key] = read(value)
        except ValueError:
            raise ValueError(f"auto: {key} is {value!r}; expected a number") from None
    return AutoRule(**values)
