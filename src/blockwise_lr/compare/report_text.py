"""The text of a comparison's report, in Markdown and in HTML."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwise_lr.compare import tables
from blockwise_lr.compare.comparison_progress import format_seconds
from blockwise_lr.compare.figures import ReportFigure
from blockwise_lr.compare.report_facts import what_was_run
from blockwise_lr.errors import UserError
from blockwise_lr.extras import missing


def markdown_report(content: Mapping[str, Any], figures: Mapping[str, list[ReportFigure]]) -> str:
    """Return report.md.

    Args:
        content: the content of compare.json.
        figures: the figures by group, from `draw_figures`.
    """
    escape, sections = tables.escape_markdown, _sections(content)

    def images(group: str, alt: str) -> list[str]:
        return [f"![{alt}]({figure.name}.png)" for figure in figures[group]]

    def section(key: str) -> list[str]:
        table = sections[key]
        return [f"### {escape(table.title)}", tables.markdown_table(table)] if table.rows else []

    parts = [
        f"# Comparison: {escape(content['preset'])}, {content['steps']:,} steps",
        *[f"**{escape(sentence)}**" for sentence in content["answer"]],
        "\n".join(f"- {escape(warning)}" for warning in content["warnings"]),
        "## Loss",
        *images("overview", "Validation loss of every arm"),
        *images("comparisons", "Validation loss with loss gap and speed-up"),
        *section("comparisons"),
        *section("arms"),
        *(["## Choice of the base learning rate", *images("tuning", "Tune loss against base learning rate")]
          if content["tuning"] else []),
        "## Learning rate of every block",
        *images("lr", "Learning rate of every block over the steps, and ratios that change"),
        *section("lr_over_rms"),
        "## What was run",
        *(part for key in ("run", "model", "optim", "data", "hardware", "versions") for part in section(key)),
        *section("runs"),
        "## How to repeat it",
        code_block(content["command"]),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def code_block(text: str, language: str = "") -> str:
    """Return text as a Markdown code block, with a fence that is longer than any run of backticks in the text."""
    fence = "`" * max(3, _longest_backtick_sequence(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def html_report(content: Mapping[str, Any], figures: Mapping[str, list[ReportFigure]]) -> str:
    """Return report.html, a single file that contains its figures.

    Args:
        content: the content of compare.json.
        figures: the figures by group, from `draw_figures`.

    Raises:
        UserError: jinja2 is not installed.
    """
    return render_template(
        Path(__file__).parent / "report.html.j2", content, sections=_sections(content), figures=figures
    )


def render_template(
    template: Path,
    content: Mapping[str, Any],
    *,
    sections: Mapping[str, tables.Table],
    figures: Mapping[str, list[ReportFigure]],
) -> str:
    """Return a page from a template, which may use the macros and the style of this folder.

    Args:
        template: path of the template. It sees `content` as `c`, and the figures as addresses of images.
        content: the content of the report's JSON file.
        sections: the tables by section.
        figures: the figures by group.

    Raises:
        UserError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise UserError(str(missing("report.html needs", "jinja2", "report"))) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # As images, figures cannot run code, and their element ids cannot collide.
    images = {
        group: [f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}" for figure in drawn]
        for group, drawn in figures.items()
    }
    return environment.get_template(template.name).render(c=content, tables=sections, images=images)


def _sections(content: Mapping[str, Any]) -> dict[str, tables.Table]:
    """Return the tables of the report by section."""
    config = content["config"]
    varied = {"optimizer", "ratios", "base_lr"}
    varied |= {"warmup_fraction", "warmup_steps"} if tables.warmups_differ(content) else set()
    optimizers = {arm["optimizer"] for arm in content["arms"].values()}
    run = {
        "preset": content["preset"],
        "steps N": f"{content['steps']:,}",
        "seeds": ", ".join(map(str, content["seeds"])),
        "base learning rate": _how_tuned(content),
        "sequences per step (each process)": config["batch_size"] * config["accumulation"],
        "precision": config["precision"],
        "date": content["date"],
        "training time, summed over runs": format_seconds(content["seconds"]),
    }
    return {
        "comparisons": tables.comparisons_table(content),
        "arms": tables.arms_table(content),
        "lr_over_rms": tables.lr_over_rms_table(content),
        **what_was_run(content, run, optimizers, varied),
        "runs": tables.runs_table(content),
    }


def _how_tuned(content: Mapping[str, Any]) -> str:
    """Describe how the base learning rates were chosen."""
    if content["base_lrs"] is not None:
        grid = ", ".join(f"{lr:g}" for lr in content["base_lrs"])
        if content["warmups"] is not None:
            grid += f" with warm-ups of {', '.join(f'{warmup:.0%}' for warmup in content['warmups'])}"
        if content["refined"]:
            grid += ", then a factor of √2 to either side of the best,"
        chosen = f"over {grid} with seed {content['seeds'][0]}, chosen by the tune loss"
        if at_edge := content.get("at_edge"):
            return f"every arm tried {chosen}; at the edge of the grid, so not tuned: {', '.join(at_edge)}"
        return f"every arm tuned {chosen}"
    if content["tuned"]:
        return "tuned beforehand for every arm and horizon; part of the preset"
    return "not tuned"


def _longest_backtick_sequence(text: str) -> int:
    return max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
