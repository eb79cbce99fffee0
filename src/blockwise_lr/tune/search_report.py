"""Write the results of a search: tune.json, ratios.json, report.md, report.html and the figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from blockwise_lr.compare.comparison_progress import format_seconds
from blockwise_lr.compare.figures import ReportFigure
from blockwise_lr.compare.report_text import code_block, render_template
from blockwise_lr.compare.tables import Table, escape_markdown, facts_table, markdown_table
from blockwise_lr.compare.wording import format_loss, format_signed
from blockwise_lr.files import write_json_atomic, write_text_atomic
from blockwise_lr.train.config import config_from_dict
from blockwise_lr.tune import search_wording
from blockwise_lr.tune.search_figures import draw_figures
from blockwise_lr.tune.valley import ALLOWED

if TYPE_CHECKING:
    from rich.console import Console

TUNE = "tune.json"
_NAMES = {"base_lr": "base LR", "warmup": "warm-up"}


def write_results(content: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Write every file of the results into `out`, and return the content as tune.json holds it.

    Args:
        content: the content of tune.json.
        out: the search's folder.
    """
    # The returned content must equal what reading the file gives, such as lists in place of tuples.
    content = cast("dict[str, Any]", json.loads(json.dumps(content, allow_nan=False)))
    write_json_atomic(out / search_wording.RATIOS, content["ratios"])
    figures = draw_figures(content, out)
    sections = _sections(content)
    template = Path(__file__).parent / "search_report.html.j2"
    page = render_template(template, content, sections=sections, figures=figures)
    write_text_atomic(out / "report.md", _markdown(content, sections, figures))
    write_text_atomic(out / "report.html", page)
    # tune.json is written last: its presence means that the reports are complete.
    write_json_atomic(out / TUNE, content)
    return content


def print_summary(content: Mapping[str, Any], out: Path, console: Console | None = None) -> None:
    """Print the answer, the ratios, the warnings, and the lines to paste.

    Args:
        content: the content of tune.json.
        out: the search's folder.
        console: where to print. Default: standard output.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    table = _ratios_table(content)
    shown = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if i in table.text_columns else "right")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    for sentence in content["answer"]:
        console.print(Text(sentence, style="bold"))
    for warning in content["warnings"]:
        console.print(Text(f"Note: {warning}"))
    console.print(Text(f"\n{content['paste']['python']}\n\n{content['paste']['command']}\n"), soft_wrap=True)
    console.print(Text(f"Report: {out / 'report.html'}"), soft_wrap=True)


def _markdown(
    content: Mapping[str, Any], sections: Mapping[str, Table], figures: Mapping[str, list[ReportFigure]]
) -> str:
    """Return report.md."""

    def image(name: str, alt: str) -> list[str]:
        return [f"![{alt}]({figure.name}.png)" for figure in figures[name]]

    def section(key: str) -> list[str]:
        table = sections[key]
        return [f"### {escape_markdown(table.title)}", markdown_table(table)] if table.rows else []

    paste = content["paste"]
    parts = [
        f"# Search for ratios: {escape_markdown(content['preset'])}, {content['steps']:,} steps",
        *[f"**{escape_markdown(sentence)}**" for sentence in content["answer"] if sentence],
        "\n".join(f"- {escape_markdown(warning)}" for warning in content["warnings"]),
        "## Use them",
        "In your own training loop, after `split_fused(model)`, with `from blockwise_lr import param_groups`:",
        code_block(paste["python"], "python"),
        "On the command line:",
        code_block(paste["command"]),
        "## Gain over the tuned uniform learning rate",
        *image("gain", "Training loss of the best ratios and of uniform, and their val loss by seed"),
        *section("gain"),
        "## Every ratio",
        *image("ratios", "Tune loss of all trials against the ratio of each block, with the fitted valley"),
        *section("ratios"),
        "## The search",
        *image("search", "Tune loss of every trial, and the best so far"),
        *section("known"),
        "## What was run",
        *(part for key in ("run", "model", "optim", "data", "hardware", "versions") for part in section(key)),
        *section("trials"),
        "## How to repeat it",
        code_block(content["command"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sections(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables of the report by section."""
    config = config_from_dict(content["config"])
    optim = dataclasses.asdict(config.optim.resolved())
    searched = {"base_lr", "ratios", "warmup_fraction", "warmup_steps", "re_measure"}
    rule = content["early_end"]
    run = {
        "preset": content["preset"],
        "steps of a trial": f"{content['steps']:,}",
        "proxy": f"{content['proxy']['size']}, {content['proxy']['parameters']:,} parameters"
        + ("" if content["proxy"]["stands_for"] else " (the model itself)"),
        "sampler": content["sampler"],
        "early end": "off" if rule is None else f"{rule['margin']:g} nats behind, after {rule['share']:.0%}",
        "seed of the search": str(content["seed"]),
        "seeds of the gain": ", ".join(map(str, content["seeds"])),
        "noise of a loss (standard deviation between seeds)": "unknown"
        if content["noise"] is None
        else f"{content['noise']:.4f}",
        "training time, summed over runs": format_seconds(content["seconds"]),
        "date": content["date"],
    }
    data = content["data"] or content["config"]["data"]
    return {
        "gain": _gain_table(content),
        "ratios": _ratios_table(content),
        "known": _known_table(content),
        "trials": _trials_table(content),
        "run": facts_table("Search", run),
        "model": facts_table("Model of the user's run", content["config"]["model"]),
        "optim": facts_table(
            "Optimizer of all trials", {k: v for k, v in optim.items() if k not in searched}
        ),
        "data": facts_table("Text", data),
        "hardware": facts_table("Hardware", content["hardware"]),
        "versions": facts_table("Software", {**content["versions"], "git commit": content["git_commit"]}),
    }


def _gain_table(content: Mapping[str, Any]) -> Table:
    pairs = zip(content["uniform"]["runs"], content["best"]["runs"], content["gain"]["per_seed"])
    rows = [
        [
            str(before["seed"]),
            format_loss(before["val_loss"]),
            format_loss(after["val_loss"]),
            format_signed(gain),
        ]
        for before, after, gain in pairs
    ]
    return Table(
        "Validation loss",
        ["seed", "tuned uniform", "best ratios", "gain"],
        rows,
        note="In nats per token, after the last step; positive means that the ratios are better. The search used the "
        f"seed {content['seed']}.",
    )


def _ratios_table(content: Mapping[str, Any]) -> Table:
    rows = []
    enough = content["near_trials"] >= content["needed_trials"]
    over_rms = content["best"].get("lr_over_initial_rms", {})  # an older tune.json lacks it
    for name, valley in content["valleys"].items():
        row = [_NAMES.get(name, name.upper()), f"{valley['value']:.3g}", search_wording.format_range(valley)]
        if "decided" in valley:
            cost = f"{format_signed(valley['cost_of_one'], 3)} ± {valley['stderr']:.3f}"
            cost = f"≥ {cost}" if valley["beyond_reach"] else cost
            row += [cost if enough else "–", search_wording.verdict(valley)]
        row += [""] * (5 - len(row))
        rows.append(row + ([f"{over_rms[name]:.3g}" if name in over_rms else ""] if over_rms else []))
    columns = ["", "best", f"within {ALLOWED:g} nats", "cost of 1", "decided"]
    return Table(
        f"Ratios, with {content['reference'].upper()} at ratio 1",
        columns + (["LR / RMS at start"] if over_rms else []),
        rows,
        text_columns=frozenset({0, 4}),
        note=search_wording.RANGE_NOTE + (f" {search_wording.RMS_NOTE}" if over_rms else ""),
    )


def _known_table(content: Mapping[str, Any]) -> Table:
    trials = {trial["number"]: trial for trial in content["trials"]}
    named = [("tuned uniform", content["uniform"]["trial"])]
    named += [(start["name"], start["trial"]) for start in content["start"]]
    named.append(("best", content["best"]["trial"]))
    rows = [[name, *_cells(trials[number])] for name, number in named]
    return Table(
        "The points that the search started from, and the best",
        ["", *_TRIAL_COLUMNS],
        rows,
        text_columns=frozenset({0, 4}),
        note="One run each, with the seed of the search. The tune loss chooses.",
    )


_TRIAL_COLUMNS = ["trial", "base LR", "warm-up", "ratios", "tune loss", "val loss"]


def _cells(trial: Mapping[str, Any]) -> list[str]:
    point = trial["point"]
    ratios = ", ".join(f"{block} {ratio:.3g}" for block, ratio in point["ratios"].items()) or "uniform"
    ended = f"{trial['status']} at {trial['step']}"
    losses = [ended if trial[name] is None else f"{trial[name]:.4f}" for name in ("tune_loss", "val_loss")]
    return [str(trial["number"]), f"{point['base_lr']:.3g}", f"{point['warmup']:.0%}", ratios, *losses]


def _trials_table(content: Mapping[str, Any]) -> Table:
    rows = [
        [trial["phase"], str(trial["seed"]), *_cells(trial)]
        for trial in content["trials"]
        if trial["order"] is not None
    ]
    return Table("Every trial", ["phase", "seed", *_TRIAL_COLUMNS], rows, text_columns=frozenset({0, 5}))
