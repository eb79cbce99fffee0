"""Show the ratios of a run: as lines on the terminal, and as a panel of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockwise_lr.blocks import Block
from blockwise_lr.directional.slope import short
from blockwise_lr.drawing import block_colour, log_ticks

if TYPE_CHECKING:
    from blockwise_lr.directional.directional_report import DirectionalReport
    from blockwise_lr.directional.run_ratios import RunRatios


def run_ratios(reports: Sequence[DirectionalReport]) -> RunRatios | None:
    """Return the ratios of the reports, or None if all were measured at learning rate 0."""
    try:
        return reports[0].ratios_of_run(reports)
    except ValueError:
        return None


def ratio_cell(ratios: RunRatios, block: Block) -> str:
    """Return the ratio of a block for a table; an asterisk marks one that is `measured`'s."""
    return short(ratios[block]) + "*" * (block in ratios.undetermined)


def ratio_lines(reports: Sequence[DirectionalReport]) -> list[str]:
    """Return the lines to print below the tables: the blocks that are not determined, and the ratios to paste."""
    if not reports or (ratios := run_ratios(reports)) is None:
        return []
    decided = [block.value for block in ratios if block not in ratios.undetermined]
    left = [block.value for block in ratios.undetermined]
    if not set(decided) - {ratios.anchor.value}:
        paste = "no block is determined by this measurement: use --ratios measured"
    else:
        by = f"; {', '.join(left)} as in measured" if left else ""
        paste = f"--ratios {ratios.paste()}    (determined here: {', '.join(decided)}{by})"
    return [*ratios.notes(), paste]


def draw_ratios(axes: Any, ratios: RunRatios) -> None:
    """Draw the ratio of every block: what the reports say with its 95 % interval, and the ratio to train with.

    Args:
        axes: matplotlib axes to draw on.
        ratios: the ratios of one run.
    """
    blocks = list(ratios)
    for at, block in enumerate(blocks):
        low, high = (min(max(end, 1e-3), 1e4) for end in ratios.interval(block))
        colour, alone = block_colour(block), min(max(ratios.alone[block], 1e-3), 1e4)
        undetermined = block in ratios.undetermined
        axes.errorbar(
            [at], [alone], yerr=[[alone - low], [high - alone]], color=colour, marker="o", markersize=4,
            markerfacecolor="white" if undetermined else colour, capsize=2, linewidth=1.2,
            linestyle="none", alpha=0.5 if undetermined else 1.0,
        )  # fmt: skip
        axes.plot([at + 0.25], [ratios[block]], marker="<", color=colour, linestyle="none")
        axes.plot([at - 0.3, at + 0.3], [ratios.prior[block]] * 2, color="#555555", linewidth=0.9)
    axes.set_yscale("log")
    log_ticks(axes.yaxis)
    axes.set_xticks(range(len(blocks)), [block.value.upper() for block in blocks], fontsize=8)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_title(
        "ratio over FFN's: ● by these reports (hollow: not\ndetermined), ◀ to train with, — in `measured`",
        fontsize=9,
        loc="left",
    )
