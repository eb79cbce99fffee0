"""Run a sweep over ratios, and write its JSON file, report.md and the figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr import drawing
from blockwise_lr.compare.comparison_progress import ComparisonProgress
from blockwise_lr.compare.execute import Runner, run_all, train_command
from blockwise_lr.compare.over_seeds import loss_gap
from blockwise_lr.compare.plan import Plan
from blockwise_lr.compare.ratio_sweeps import Kind, Point, valley_width
from blockwise_lr.compare.results import Results, read_results
from blockwise_lr.compare.tables import Table, escape_markdown, markdown_table
from blockwise_lr.compare.wording import format_interval, format_loss, format_signed
from blockwise_lr.compare.write_report import check_runs
from blockwise_lr.files import write_json_atomic, write_text_atomic
from blockwise_lr.optim.block_values import digits

TOLERANCE = 0.01
"""The rise of the loss, in nats, that ends a valley."""

_COLUMNS = 3  # panels in a row of the figure


def run_sweep(
    kind: Kind,
    plan: Plan,
    points: Sequence[Point],
    out: str | Path,
    *,
    jobs: int = 1,
    command: str,
    progress: ComparisonProgress | None = None,
    runner: Runner = train_command,
) -> dict[str, Any]:
    """Train every arm of a sweep, and write KIND.json, report.md and KIND.png into `out`.

    Called again with the same `out`, it trains only the missing runs.

    Args:
        kind: "robustness" or "ablation".
        plan: the plan of :func:`blockwise_lr.compare.ratio_sweeps.sweep_plan`.
        points: the points of the plan's arms, in the same order; the first is the reference.
        out: the folder, created if missing.
        jobs, command, progress, runner: as in :func:`blockwise_lr.compare.compare`.

    Returns:
        The content of KIND.json; see :func:`sweep_content`.
    """
    out = Path(out)
    check_runs(plan)
    run_all(plan, out, jobs, progress, runner=runner)
    results = read_results(plan, out)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    made = sweep_content(kind, points, results, command=command, date=date)
    content: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))  # as it will be read
    with drawing.figure(_size(content)) as figure:
        draw_sweep(figure, content)
        drawing.save(figure, out / f"{kind}.png")
    write_text_atomic(out / "report.md", sweep_markdown(content))
    write_json_atomic(
        out / f"{kind}.json", content
    )  # written last: its presence means that the report is complete
    return content


def sweep_content(
    kind: Kind, points: Sequence[Point], results: Results, *, command: str, date: str
) -> dict[str, Any]:
    """Return the content of KIND.json.

    Returns:
        "kind", "preset", "steps", "seeds", "command", "date", "config", "hardware", "versions", "git_commit", "data":
        how it was run. "tuned": whether every arm tried a grid. "points": for each arm "arm", "ratios", "curve",
        "position", "setting", "losses" by seed, "loss" (their mean, None if one diverged), and "cost": the mean rise of
        the loss against the reference, with "ci95", paired by seed. "widths": how far each ratio can move for
        :data:`TOLERANCE` nats (robustness only).
    """
    plan = results.plan
    seeds = [str(seed) for seed in plan.seeds]
    found = []
    reference: list[float] = []
    for point, series in zip(points, plan.series, strict=True):
        losses = [run.val_loss for run in results.runs_of(series)]
        reference = reference or losses
        gap = loss_gap(reference, losses)
        finite = bool(np.isfinite(losses).all())
        found.append({
            "arm": point.arm.name, "ratios": series.arm.ratios, "curve": point.curve, "position": point.position,
            "setting": str(results.chosen[series.name]),
            "losses": {seed: loss if np.isfinite(loss) else None for seed, loss in zip(seeds, losses)},
            "loss": float(np.mean(losses)) if finite else None,
            "cost": {
                "mean": None if gap.mean is None else -gap.mean + 0.0,
                "ci95": None if gap.ci95 is None else [-gap.ci95[1] + 0.0, -gap.ci95[0] + 0.0],
            },
        })  # fmt: skip
    first = next(iter(results.all_runs)).config
    return {
        "kind": kind, "preset": plan.base.preset, "steps": plan.base.steps, "seeds": list(plan.seeds),
        "tuned": plan.tunes, "base_lrs": plan.base_lrs, "points": found,
        "widths": _widths(found) if kind == "robustness" else {},
        "command": command, "date": date, "config": plan.base.to_dict(),
        **{key: first.get(key) for key in ("hardware", "versions", "git_commit", "data")},
    }  # fmt: skip


def _widths(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curves = dict.fromkeys(point["curve"] for point in points if point["curve"])
    return {
        curve: valley_width(
            {p["position"]: p["cost"]["mean"] for p in points if p["curve"] == curve}, TOLERANCE
        )
        for curve in curves
    }


def sweep_markdown(content: Mapping[str, Any]) -> str:
    """Return report.md."""
    kind, seeds = content["kind"], content["seeds"]
    if kind == "robustness":
        title = "Robustness: every ratio scaled, one at a time and all together"
        note = "Rise: the loss minus that of the unscaled ratios, in nats per token, paired by seed."
    else:
        title = "Ablation: blocks switched on one after another, in both orders"
        note = "Rise: the loss minus that of uniform ratios, in nats per token, paired by seed; negative is a gain."
    tuned = (
        f"Every arm tuned its base learning rate over {', '.join(f'{lr:g}' for lr in content['base_lrs'])} with seed "
        f"{seeds[0]}, by the tune loss."
        if content["base_lrs"]
        else f"All arms have one setting ({content['points'][0]['setting']}); it was not tuned for each of them."
    )
    rows = [
        [
            point["arm"], point["ratios"], point["setting"], format_loss(point["loss"]),
            format_signed(point["cost"]["mean"]), format_interval(point["cost"]["ci95"], signed=True),
        ]
        for point in content["points"]
    ]  # fmt: skip
    table = Table(
        title, ["arm", "ratios", "setting", "loss", "rise", "95 % interval"], rows, frozenset({0, 1, 2}), note
    )
    parts = [
        f"# {title}",
        f"{escape_markdown(content['preset'])}, {content['steps']:,} steps, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}. {tuned}",
        *(["One seed cannot separate an effect from noise."] if len(seeds) == 1 else []),
        f"![Loss of every arm]({kind}.png)",
        *_width_section(content["widths"]),
        "## Every arm",
        markdown_table(table),
        "## How to repeat it",
        f"```\n{content['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _width_section(widths: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not widths:
        return []
    signs = {"exact": "", "at_most": "≤ ", "at_least": "≥ "}
    rows = [
        [curve, *(f"{signs[width[f'{side}_bound']]}{width[side]:.2g}" for side in ("low", "high"))]
        for curve, width in widths.items()
    ]
    note = "≤ and ≥: the valley is wider than the sweep, or ends before a run that diverged."
    return [
        f"## How far a ratio can move for {TOLERANCE:g} nats",
        markdown_table(Table("", ["ratio of", "smallest factor", "largest factor"], rows, note=note)),
    ]


def _size(content: Mapping[str, Any]) -> tuple[float, float]:
    panels = len(_curves(content)) if content["kind"] == "robustness" else 1
    columns = min(_COLUMNS, panels)
    return (max(4.8, 3.0 * columns), 2.6 * -(-panels // columns) + 0.4)


def _curves(content: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(point["curve"] for point in content["points"] if point["curve"]))


def draw_sweep(figure: Any, content: Mapping[str, Any]) -> None:
    """Draw the valley of every ratio, one panel each, or the loss over the blocks that are switched on."""
    points, curves = content["points"], _curves(content)
    robustness = content["kind"] == "robustness"
    rows, columns = (-(-len(curves) // _COLUMNS), min(_COLUMNS, len(curves))) if robustness else (1, 1)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(curves) :] if robustness else ():
        axes.set_visible(False)
    for i, curve in enumerate(curves or [""]):
        axes = grid[i] if robustness else grid[0]
        own = sorted((p for p in points if p["curve"] in ("", curve)), key=lambda p: p["position"])
        finite = [p for p in own if p["cost"]["mean"] is not None]
        means = [p["cost"]["mean"] for p in finite]
        bars = [p["cost"]["ci95"] or [mean, mean] for p, mean in zip(finite, means)]
        below = [mean - low for mean, (low, _) in zip(means, bars)]
        above = [high - mean for mean, (_, high) in zip(means, bars)]
        style = {**drawing.series_style(i), "label": curve, "marker": "o"}
        if robustness:
            style |= {"color": drawing.block_colour(curve), "linestyle": "-"}
        axes.errorbar(
            [p["position"] for p in finite], means, yerr=[below, above], capsize=2, linewidth=1.6, **style
        )
        axes.axhline(0.0, color="#777777", linewidth=0.8)
        if robustness:
            axes.axhline(TOLERANCE, color="#777777", linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            positions = [p["position"] for p in own]
            axes.set_xticks(positions, [f"×{digits(position)}" for position in positions])
            axes.set_title(curve, fontsize=9, loc="left")
        for point in finite if not robustness else ():  # the block that each point switches on
            if "+" in point["arm"]:
                place = {"xytext": (0, 6 if i else -13), "textcoords": "offset points", "ha": "center"}
                added = point["arm"].rpartition("+")[2]
                axes.annotate(added, (point["position"], point["cost"]["mean"]), fontsize=8, **place)
        for diverged in (p for p in own if p["cost"]["mean"] is None):
            axes.axvline(diverged["position"], color="#bb3333", linewidth=0.8, linestyle="--")
    if not robustness:
        grid[0].set_xlabel("blocks switched on", fontsize=9)
        grid[0].legend(fontsize=9)
    figure.supylabel("rise of the loss (nats)", fontsize=9)
