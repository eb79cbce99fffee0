"""Measure how sharp the loss is along the parameters of each block."""

from blockwise_lr.sharpness.estimate import Estimate
from blockwise_lr.sharpness.measure import Estimator, measure_sharpness
from blockwise_lr.sharpness.monitor import SharpnessMonitor
from blockwise_lr.sharpness.records import read_reports
from blockwise_lr.sharpness.report import SharpnessReport

__all__ = [
    "Estimate",
    "Estimator",
    "SharpnessMonitor",
    "SharpnessReport",
    "measure_sharpness",
    "read_reports",
]
