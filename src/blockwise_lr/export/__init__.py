"""The learning rates of a model's blocks as configuration for other trainers."""

from blockwise_lr.export.exporters import REFUSED, TARGETS, ExportedRates, export_rates
from blockwise_lr.export.rates import RateGroup

__all__ = ["REFUSED", "TARGETS", "ExportedRates", "RateGroup", "export_rates"]
