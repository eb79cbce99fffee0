"""Run a sweep over ratios, and write its JSON file, report.md, report.html and the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from blockwise_lr.compare.comparison_progress import ComparisonProgress
from blockwise_lr.compare.execute import Runner, run_all, train_command
from blockwise_lr.compare.figures import ReportFigure
from blockwise_lr.compare.ratio_sweeps import Kind, Point
from blockwise_lr.compare.report_text import code_block, render_template
from blockwise_lr.compare.results import read_results
from blockwise_lr.compare.sweep_figure import draw_figures
from blockwise_lr.compare.sweep_findings import sweep_content
from blockwise_lr.compare.sweep_plan import SweepPlan
from blockwise_lr.compare.sweep_tables import sweep_tables, sweep_title
from blockwise_lr.compare.tables import Table, escape_markdown, markdown_table
from blockwise_lr.compare.write_report import check_no_other_report, check_runs
from blockwise_lr.errors import UserError
from blockwise_lr.files import write_json_atomic, write_text_atomic


def run_sweep(
    kind: Kind,
    plan: SweepPlan,
    points: Sequence[Point],
    out: str | Path,
    *,
    jobs: int = 1,
    command: str,
    progress: ComparisonProgress | None = None,
    runner: Runner = train_command,
) -> dict[str, Any]:
    """Train every arm of a sweep, and write KIND.json, report.md, report.html and the figures into `out`.

    Called again with the same `out`, it trains only the missing runs.

    Args:
        kind: "robustness" or "ablation".
        plan: the plan of :func:`blockwise_lr.compare.sweep_plan.sweep_plan`.
        points: the points that the plan was made from; the first is the reference.
        out: the folder, created if missing.
        jobs, command, progress, runner: as in :func:`blockwise_lr.compare.compare`.

    Returns:
        The content of KIND.json; see :func:`blockwise_lr.compare.sweep_findings.sweep_content`.

    Raises:
        UserError: a run failed, or `out` is in use or holds a comparison, a search or another sweep.
    """
    out = Path(out)
    _check_folder(kind, out)
    check_runs(plan)
    run_all(plan, out, jobs, progress, runner=runner)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    made = sweep_content(kind, points, read_results(plan, out), out, command=command, date=date)
    return write_sweep(made, out)


def _check_folder(kind: Kind, out: Path) -> None:
    """Check that the report of a sweep replaces no other. The two kinds of sweep can share out/runs through links.

    Raises:
        UserError: `out` holds a comparison, a search or another sweep.
    """
    check_no_other_report(kind, out)
    if (out / "plan.json").exists():
        raise UserError(f"{out} holds a comparison or a search (plan.json); choose another --out for {kind}")


def write_sweep(content: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Write every file of the report into `out`, and return the content as KIND.json holds it."""
    # The returned content must equal what reading the file gives, such as lists in place of tuples.
    content = cast("dict[str, Any]", json.loads(json.dumps(content, allow_nan=False)))
    figures = draw_figures(content, out)
    sections = sweep_tables(content)
    template = Path(__file__).parent / "sweep_report.html.j2"
    given = {**content, "title": sweep_title(content)}
    page = render_template(template, given, sections=sections, figures=figures)
    write_text_atomic(out / "report.md", sweep_markdown(content, sections, figures))
    write_text_atomic(out / "report.html", page)
    # The JSON file is written last: its presence means that the reports are complete.
    write_json_atomic(out / f"{content['kind']}.json", content)
    return content


def sweep_markdown(
    content: Mapping[str, Any], sections: Mapping[str, Table], figures: Mapping[str, list[ReportFigure]]
) -> str:
    """Return report.md.

    Args:
        content: the content of the JSON file.
        sections: the tables, from :func:`blockwise_lr.compare.sweep_tables.sweep_tables`.
        figures: the figures by group.
    """

    def images(group: str, alt: str) -> list[str]:
        return [f"![{alt}]({figure.name}.png)" for figure in figures[group]]

    def section(key: str) -> list[str]:
        table = sections[key]
        return [f"### {escape_markdown(table.title)}", markdown_table(table)] if table.rows else []

    parts = [
        f"# {sweep_title(content)}",
        *[f"**{escape_markdown(sentence)}**" for sentence in content["answer"]],
        "\n".join(f"- {escape_markdown(warning)}" for warning in content["warnings"]),
        "## Result",
        *images("sweep", "Loss of every arm"),
        *section("widths"),
        *section("worth"),
        *section("arms"),
        *(["## Choice of the base learning rate", *images("tuning", "Tune loss against base learning rate")]
          if content["tuning"] else []),
        "## What was run",
        *(part for key in ("run", "model", "optim", "data", "hardware", "versions") for part in section(key)),
        *section("runs"),
        "## How to repeat it",
        code_block(content["command"]),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"
