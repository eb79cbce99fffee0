"""Write the report of a fit over sizes: scaling.json, report.md, report.html and the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from blockwise_lr.compare.figures import ReportFigure
from blockwise_lr.compare.report_text import code_block, render_template
from blockwise_lr.compare.scaling import DRAWS, scaling_content
from blockwise_lr.compare.scaling_figures import draw_factors, draw_gaps, draw_laws
from blockwise_lr.compare.scaling_sizes import Counted, read_sizes
from blockwise_lr.compare.scaling_tables import scaling_tables
from blockwise_lr.compare.tables import Table, escape_markdown, markdown_table
from blockwise_lr.compare.write_report import check_no_other_report
from blockwise_lr.files import make_folder, write_json_atomic, write_text_atomic

SCALING = "scaling.json"
_SECTIONS = ("fits", "comparisons", "sizes")


def fit_sizes(
    folders: Sequence[Path],
    out: Path,
    *,
    arms: Sequence[str] = (),
    counted: Counted = "all",
    draws: int = DRAWS,
    command: str,
) -> dict[str, Any]:
    """Fit power laws to finished comparisons or runs of four sizes or more, and write the report into `out`.

    Args:
        folders: folders of comparisons or runs.
        out: the report's folder, created if missing.
        arms: the arms, the baseline first. Default: all that every size has.
        counted: which parameters count as the size.
        draws: number of draws of the bootstrap.
        command: the command line, for the report.

    Returns:
        The content of scaling.json; see :func:`blockwise_lr.compare.scaling.scaling_content`.

    Raises:
        UserError: a folder cannot be used, the sizes do not compare, two have the same number of counted parameters, or
            there are fewer than four; or `out` holds the report of another command.
    """
    check_no_other_report("scaling", out)
    sizes, names = read_sizes(folders, arms)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    content = scaling_content(sizes, names, counted=counted, draws=draws, command=command, date=date)
    make_folder(out)
    return write_scaling(content, out)


def write_scaling(content: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Write every file of the report into `out`, and return the content as scaling.json holds it."""
    # The returned content must equal what reading the file gives, such as lists in place of tuples.
    content = cast("dict[str, Any]", json.loads(json.dumps(content, allow_nan=False)))
    sections = scaling_tables(content)
    figures = _draw_figures(content, out)
    template = Path(__file__).parent / "scaling_report.html.j2"
    page = render_template(template, content, sections=sections, figures=figures)
    write_text_atomic(out / "report.md", _markdown(content, sections, figures))
    write_text_atomic(out / "report.html", page)
    # The JSON file is written last: its presence means that the reports are complete.
    write_json_atomic(out / SCALING, content)
    return content


def _draw_figures(content: Mapping[str, Any], out: Path) -> dict[str, list[ReportFigure]]:
    small = (6.4, 4.2)
    return {
        "laws": [ReportFigure.draw(out, "scaling", (9.0, 4.8), draw_laws, content)],
        "comparisons": [
            ReportFigure.draw(out, "gaps", small, draw_gaps, content),
            ReportFigure.draw(out, "factors", small, draw_factors, content),
        ],
    }


def _markdown(
    content: Mapping[str, Any], sections: Mapping[str, Table], figures: Mapping[str, list[ReportFigure]]
) -> str:
    """Return report.md."""
    captions = {
        "scaling": "Loss against parameters, with the fitted laws",
        "gaps": "Loss gap against parameters",
        "factors": "Factor of parameters that the baseline needs",
    }

    def images(group: str) -> list[str]:
        return [f"![{captions[figure.name]}]({figure.name}.png)" for figure in figures[group]]

    def section(key: str) -> list[str]:
        table = sections[key]
        return [f"### {escape_markdown(table.title)}", markdown_table(table)]

    parts = [
        "# Scaling: loss against parameters",
        *[f"**{escape_markdown(sentence)}**" for sentence in content["answer"]],
        "## What these fits cannot tell",
        "\n".join(f"- {escape_markdown(warning)}" for warning in content["warnings"]),
        "## The laws",
        *images("laws"),
        *section("fits"),
        "## Against the baseline",
        *images("comparisons"),
        *section("comparisons"),
        "## What was read",
        *section("sizes"),
        "## How to repeat it",
        code_block(content["command"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
