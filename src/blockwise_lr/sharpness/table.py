"""A SharpnessReport as a table on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from blockwise_lr.blocks import Block
from blockwise_lr.sharpness.report import Estimate, SharpnessReport

if TYPE_CHECKING:
    from rich.table import Table


def table(report: SharpnessReport) -> Table:
    """By block, flattest first: sharpness with standard error, and relative to the sharpest.

    Raises:
        ModuleNotFoundError: rich is missing; says which extra to install.
    """
    try:
        from rich.table import Column, Table
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "tables need rich: pip install 'blockwise-lr[train]'", name="rich"
        ) from None

    columns = [
        Column(name, justify="right") for name in ("sharpness", "standard error", "share of NORM", "elements")
    ]
    step = "" if report.step is None else f"step {report.step:,}, "
    title = f"{step}{report.method}, {report.samples:,} samples in {report.batches} batches"
    made = Table("block", *columns, title=title, title_justify="left", title_style="italic")
    norm = report[Block.NORM].mean if Block.NORM in report else math.nan
    for block, found in sorted(report.items(), key=lambda item: item[1].mean):
        relative = f"{found.mean / norm:.3g}" if norm > 0 else ""
        made.add_row(block.value, f"{found.mean:.3e}", _error(found), relative, f"{found.numel:,}")
    return made


def _error(found: Estimate) -> str:
    if math.isnan(found.stderr):
        return ""
    percent = f" ({found.stderr / found.mean:.0%})" if found.mean > 0 else ""
    return f"{found.stderr:.1e}{percent}"
