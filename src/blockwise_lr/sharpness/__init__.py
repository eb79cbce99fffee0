"""How sharp is each block?"""

from blockwise_lr.sharpness.measure import Estimator, measure_sharpness
from blockwise_lr.sharpness.report import Estimate, SharpnessReport

__all__ = ["Estimate", "Estimator", "SharpnessReport", "measure_sharpness"]
