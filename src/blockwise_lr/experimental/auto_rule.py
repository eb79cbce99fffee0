"""AutoRule: how AutoRatios moves the ratios, as an object and as the command line spells it."""

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
    """How :class:`AutoRatios` moves the ratios. The defaults are meant for every model: nothing here needs a search.

    Args:
        begin: the ratios to begin with: "measured", those measured along uniform runs of a small model
            (``MEASURED_RATIOS``), or "uniform".
        gain: by how much the log ratio of a block whose updates always agree with the next gradient would grow over a
            whole run, while the anchor's agree as often as not.
        signal: "consistency", the mean cosine over its root mean square, so that a block with noisy gradients counts as
            much as one without; or "cosine", as it is.
        start: share of the run at which the ratios begin to move.
        stop: share of the run at which they come to rest.
        anchor: what keeps its ratio: "ffn", so that the base learning rate is FFN's (without one: the largest
            block's), or "mean", the geometric mean of all blocks.
        measurements: about how many of a whole run's steps would be measured; at most all. As often the
            guard reads the loss.
        re_measure: go on after `stop`, every so many steps; 0: rest.
        low, high: bounds of a ratio.
        guard: by how much the smoothed training loss may rise above its lowest, in nats, before ratios are backed off.

    Raises:
        ValueError: a value out of range; names it.
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
        """Return the ratios that a run by this rule begins with."""
        return MEASURED_RATIOS if self.begin == "measured" else UNIFORM_RATIOS


def parse_auto(text: str) -> AutoRule | None:
    """The rule that "auto" or "auto:gain=100,stop=0.5" names; None for anything else.

    Raises:
        ValueError: an option that there is not, or a value out of range.

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
