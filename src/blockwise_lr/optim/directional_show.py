"""A DirectionalReport on the terminal, and as a figure over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwise_lr.blocks import Block
from blockwise_lr.drawing import block_colour, figure, log_ticks, save
from blockwise_lr.optim.directional_report import DirectionalReport, Slope
from blockwise_lr.optim.measured import ratios_from_sharpness

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = 6


def directional_table(report: DirectionalReport) -> Table:
    """By block: its learning rate, the one it could take with its standard error, and the verdict.

    Raises:
        ModuleNotFoundError: rich is missing; says which extra to install.

    Example:
        >>> from rich.console import Console                            # doctest: +SKIP
        >>> Console().print(directional_table(report))                  # doctest: +SKIP
    """
    from_rich = _rich()
    batches = "1 batch" if report.batches == 1 else f"{report.batches} batches"
    step = "" if report.step is None else f"step {report.step:,}, "
    columns = [
        from_rich.Column(name, justify="right", no_wrap=True) for name in ("learning rate", "could take")
    ]
    made: Table = from_rich.Table(
        "block",
        *columns,
        "verdict",
        title=f"{step}along the optimizer's update, {report.samples:,} samples in {batches}",
        title_justify="left",
        title_style="italic",
    )
    for block, slope in report.items():
        made.add_row(
            block.value,
            f"{slope.lr:.2e}",
            _with_error(slope.best_lr, slope.best_lr_stderr),
            slope.verdict,
        )
    return made


def shown_report(reports: Sequence[DirectionalReport]) -> DirectionalReport:
    """The one at the highest learning rate, the last of several such; at the schedule's floor, all could go up."""
    return max(reversed(reports), key=lambda report: max(slope.lr for slope in report.values()))


def directional_run_table(reports: Sequence[DirectionalReport]) -> Table:
    """Along a run: by how much each block's learning rate could have been higher, and the ratios of the mean.

    Args:
        reports: of one run, earliest first; of more than COLUMNS some are shown, and the ratios are of all.

    Raises:
        ModuleNotFoundError: rich is missing; says which extra to install.
    """
    from_rich = _rich()
    count = min(COLUMNS, len(reports))
    shown = [reports[round(i * (len(reports) - 1) / max(count - 1, 1))] for i in range(count)]
    try:
        ratios: Mapping[Block, float] = ratios_from_sharpness(list(reports))
    except ValueError:  # at learning rate 0 all along
        ratios = {}
    steps = ["" if report.step is None else f"{report.step:,}" for report in shown]
    columns = [from_rich.Column(name, justify="right", no_wrap=True) for name in (*steps, "ratio")]
    made: Table = from_rich.Table(
        "block",
        *columns,
        title="could take / learning rate, by step (-: it raises the loss); ratio: the mean over FFN",
        title_justify="left",
        title_style="italic",
    )
    for block in (block for block in Block if any(block in report for report in reports)):
        cells = [_factor(report[block]) if block in report else "" for report in shown]
        made.add_row(block.value, *cells, f"{ratios[block]:.2g}" if block in ratios else "")
    return made


def _factor(slope: Slope) -> str:
    return f"x{slope.factor:.2g}" if slope.signal > 0 and math.isfinite(slope.factor) else "-"


def _rich() -> Any:
    try:
        from rich import table
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "tables need rich: pip install 'blockwise-lr[train]'", name="rich"
        ) from None
    return table


def _with_error(value: float, stderr: float) -> str:
    return f"{value:.1e}" if math.isnan(stderr) else f"{value:.1e} ± {stderr:.1e}"


def plot_directional(reports: Sequence[DirectionalReport], path: str | Path) -> Path:
    """How far each block's learning rate is from the one it could take, over training.

    Args:
        reports: of one run, earliest first; one is enough.
        path: of the figure; ends in .png, .svg or .pdf.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: no report, or another ending.
    """
    if not reports:
        raise ValueError("no reports; expected one or more")
    with figure((6.4, 4.2)) as made:
        axes = made.subplots()
        draw_directional(axes, reports)
        return save(made, path)


def draw_directional(axes: Any, reports: Sequence[DirectionalReport]) -> None:
    """What :func:`plot_directional` shows, on `axes`."""
    blocks = [block for block in Block if any(block in report for report in reports)]
    factors = [s.factor for r in reports for s in r.values() if math.isfinite(s.factor) and s.factor > 0]
    low, high = min([*factors, 0.1]) / 2, max([*factors, 10.0]) * 2
    strips = low / 1.35 ** (len(blocks) + 1)  # below, a line of ▼ for each block
    axes.axhline(1.0, color="#555555", linewidth=0.9)
    for number, block in enumerate(blocks):
        found = [(x, report[block]) for x, report in enumerate(reports) if block in report]
        # Side by side, so that error bars of the same step can be told apart.
        at = [_step(reports, x) + _nudge(reports, number, len(blocks)) for x, _ in found]
        _draw_block(axes, block, at, [slope for _, slope in found], strips * 1.35 ** (len(blocks) - number))
    axes.axhline(low, color="#BBBBBB", linewidth=0.6)
    axes.set_ylim(strips, high)
    log_ticks(axes.yaxis)
    axes.set_ylabel("learning rate it could take / its own")
    if len(reports) > 1:
        axes.set_xlabel("step")
    else:
        axes.set_xticks([])
    axes.legend(ncols=2, fontsize=8)
    axes.set_title("▼: the update raises the loss at any learning rate", fontsize=9, loc="left")


def _draw_block(axes: Any, block: Block, at: Sequence[float], slopes: Sequence[Slope], strip: float) -> None:
    colour = block_colour(block)
    shown = [s.factor if s.factor > 0 and math.isfinite(s.factor) else math.nan for s in slopes]
    errors = [0.0 if math.isnan(s.best_lr_stderr) or not s.lr else s.best_lr_stderr / s.lr for s in slopes]
    below = [min(error, 0.9 * f) if f == f else 0.0 for error, f in zip(errors, shown)]
    axes.errorbar(at, shown, yerr=[below, errors], color=colour, marker="o", markersize=4, capsize=2,
                  linewidth=1.2, label=block.value)  # fmt: skip
    lost = [x for x, s in zip(at, slopes) if not s.factor > 0]
    axes.plot(lost, [strip] * len(lost), linestyle="none", marker="v", markersize=5, color=colour)


def _step(reports: Sequence[DirectionalReport], index: int) -> float:
    step = reports[index].step
    return float(index if step is None else step)


def _nudge(reports: Sequence[DirectionalReport], number: int, blocks: int) -> float:
    width = max(_step(reports, len(reports) - 1) - _step(reports, 0), 1.0) * (0.02 if len(reports) > 1 else 1)
    return (number / max(blocks - 1, 1) - 0.5) * width
