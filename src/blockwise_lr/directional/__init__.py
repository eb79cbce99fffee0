"""Slope and curvature of the loss along the optimizer's own update, by block, and the ratios that follow."""

from blockwise_lr.directional.directional_measurement import measure_directional
from blockwise_lr.directional.directional_report import DirectionalReport
from blockwise_lr.directional.ratios_from_report import ratios_from_sharpness
from blockwise_lr.directional.slope import Slope
from blockwise_lr.sharpness.measured_ratios import MeasuredRatios

__all__ = ["DirectionalReport", "MeasuredRatios", "Slope", "measure_directional", "ratios_from_sharpness"]
