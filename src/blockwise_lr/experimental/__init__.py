"""Methods that have not shown a gain beyond error bars: ratios that change during the run."""

from blockwise_lr.experimental.auto import AutoRatios
from blockwise_lr.experimental.auto_rule import AutoRule

__all__ = ["AutoRatios", "AutoRule"]
