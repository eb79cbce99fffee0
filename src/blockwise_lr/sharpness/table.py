"""table: show a SharpnessReport as a table on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from blockwise_lr.blocks import Block
from blockwise_lr.extras import missing
from blockwise_lr.sharpness.estimate import Estimate

if TYPE_CHECKING:
    from rich.table import Table

    from blockwise_lr.sharpness.report import SharpnessReport


def table(report: SharpnessReport) -> Table:
    """Return a table of the blocks, flattest first: sharpness, standard error, and the sharpness relative to NORM.

    Args:
        report: a measurement.

    Raises:
        ModuleNotFoundError: rich is missing. The message names the extra to install.

    Example:
        >>> from rich.console import Console                            # doctest: +SKIP
        >>> Console().print(table(report))                              # doctest: +SKIP
    """
    try:
        from rich.table import Column, Table
        from rich.text import Text
    except ModuleNotFoundError:
        raise missing("tables need", "rich", "train") from None

    columns = [
        Column(name, justify="right")
        for name in ("sharpness", "standard error", "relative to NORM", "elements")
    ]
    made = Table("block", *columns, title=Text(_title(report)), title_justify="left", title_style="italic")
    norm = report[Block.NORM].mean if Block.NORM in report else math.nan
    for block, found in sorted(report.items(), key=lambda item: item[1].mean):
        # Hutchinson's estimates can be negative, and their ratio is meaningless then.
        relative = f"{found.mean / norm:.3g}" if norm > 0 and found.mean > 0 else ""
        made.add_row(block.value, f"{found.mean:.3e}", _error(found), relative, f"{found.numel:,}")
    return made


def _title(report: SharpnessReport) -> str:
    step = "" if report.step is None else f"step {report.step:,}, "
    batches = "1 batch" if report.batches == 1 else f"{report.batches} batches"
    probes = f", {report.probes} probes each" if report.probes > 1 else ""
    return f"{step}{report.method}, {report.samples:,} samples in {batches}{probes}"


def _error(found: Estimate) -> str:
    if math.isnan(found.stderr):
        return ""
    if not found.mean > 0:
        return f"{found.stderr:.1e}"
    share = found.stderr / found.mean
    return f"{found.stderr:.1e} ({share:.0%})" if share <= 1 else f"{found.stderr:.1e} (>100%)"
