"""The names of the sharpness estimators, in a module that the configuration can import without torch."""

from typing import Literal

Estimator = Literal["fisher", "empirical", "hutchinson", "optimizer"]
"""An estimator of sharpness; :func:`blockwise_lr.measure_sharpness` explains each."""
