"""What has not shown a gain beyond error bars: ratios that move in the run."""

from blockwise_lr.experimental.auto import AutoRatios
from blockwise_lr.experimental.auto_rule import AutoRule

__all__ = ["AutoRatios", "AutoRule"]
