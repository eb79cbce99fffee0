"""The names of the estimators of sharpness, for the configuration, which does without torch."""

from typing import Literal

Estimator = Literal["fisher", "empirical", "hutchinson", "optimizer"]
"""How sharpness is measured: see :func:`blockwise_lr.measure_sharpness`."""
