"""Compare training set-ups fairly: the same text, seeds and tuning for all, and a report of the results."""

from blockwise_lr.compare.arms import Arm
from blockwise_lr.compare.plan import Plan
from blockwise_lr.compare.tables import print_summary
from blockwise_lr.compare.write_report import compare, render

__all__ = ["Arm", "Plan", "compare", "print_summary", "render"]
