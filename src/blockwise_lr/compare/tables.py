"""The tables of the report, and their output as Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwise_lr.compare.comparison_progress import format_seconds
from blockwise_lr.compare.speedup import DIVERGED
from blockwise_lr.compare.wording import (
    format_interval,
    format_loss,
    format_p_value,
    format_signed,
    format_speedup,
)

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """A table of text. The columns in `text_columns` are left-aligned, all others right-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    text_columns: frozenset[int] = field(default=frozenset({0}))
    note: str = ""


def comparisons_table(content: Mapping[str, Any]) -> Table:
    """Return the table that compares every arm with the baseline."""
    rows = []
    for comparison in content["comparisons"]:
        gap = comparison["loss_gap"]
        significant = {True: "yes", False: "no", None: "unknown"}[gap["significant"]]
        rows.append([
            comparison["arm"],
            format_signed(gap["mean"]),
            format_interval(gap["ci95"], signed=True),
            format_p_value(gap["p_value"]),
            significant,
            format_speedup(comparison["speedup"]),
            format_interval(comparison["speedup"]["ci95"], 2),
            format_speedup(comparison["speedup_decayed"]),
            format_interval(comparison["speedup_decayed"]["ci95"], 2),
        ])  # fmt: skip
    against = content["comparisons"][0]["against"]
    itself = content["baseline_against_itself"]
    note = (
        "Loss gap: the baseline's terminal validation loss minus the arm's, in nats per token, paired by seed; "
        "positive means that the arm is better. Speed-up (paper): the first step at which the 2N baseline's "
        "validation loss reaches the arm's terminal loss, divided by N. The learning rate of the 2N baseline is still "
        f"high at that step; for reference, the baseline's own N-step run scores {format_speedup(itself)}. Speed-up "
        "(decayed): the horizon at which a fully decayed baseline ends at the arm's loss, divided by N. "
        "≥ and ≤ mark bounds, which have no interval."
    )
    note += "".join(
        f" {comparison['arm']}, {what}: {reason}."
        for comparison in content["comparisons"]
        for key, what in (("loss_gap", "loss gap"), ("speedup", "paper"), ("speedup_decayed", "decayed"))
        if (reason := comparison[key].get("reason", DIVERGED)) and not reason.startswith(DIVERGED)
    )
    columns = ["arm", "loss gap", "95 % CI", "p", "significant"]
    columns += ["speed-up (paper)", "95 % CI", "speed-up (decayed)", "95 % CI"]
    return Table(f"Against {against}", columns, rows, note=note)


def summary_table(content: Mapping[str, Any]) -> Table:
    """Return one table of arms and comparisons that fits a terminal."""
    comparisons = {comparison["arm"]: comparison for comparison in content["comparisons"]}
    rows = []
    for name, arm in content["arms"].items():
        mean = arm["mean_terminal_val_loss"]
        row = [name, f"{arm['base_lr']:g}", str(arm["steps"]), "diverged" if mean is None else f"{mean:.3f}"]
        if name in comparisons:
            gap = comparisons[name]["loss_gap"]
            # The interval is symmetric about the mean.
            spread = "" if gap["ci95"] is None else f" ± {(gap['ci95'][1] - gap['ci95'][0]) / 2:.3f}"
            row.append(format_signed(gap["mean"], 3) + spread)
            row += [format_speedup(comparisons[name][key]) for key in ("speedup", "speedup_decayed")]
        rows.append(row + [""] * (7 - len(row)))
    seeds = len(content["seeds"])
    note = f"Mean over {seeds} seeds, ± half a 95 % confidence interval; " if seeds > 1 else ""
    return Table(
        f"{content['preset']}: terminal validation loss (nats per token)",
        ["arm", "base LR", "steps", "loss", "gap", "speed-up", "decayed"],
        rows,
        note=f"{note}gap: to {content['comparisons'][0]['against']}; positive means better.",
    )


def arms_table(content: Mapping[str, Any]) -> Table:
    """Return the table of arms with the terminal validation loss of each seed."""
    seeds, warmups = content["seeds"], warmups_differ(content)
    rows = [
        [name, arm["optimizer"], arm["ratios"], f"{arm['base_lr']:g}"]
        + ([_percent(arm["warmup_fraction"])] if warmups else [])
        + [f"{arm['steps']:,}"]
        + [format_loss(run["terminal_val_loss"]) for run in arm["seeds"]]
        + ([format_loss(arm["mean_terminal_val_loss"])] if len(seeds) > 1 else [])
        for name, arm in content["arms"].items()
    ]
    return Table(
        "Terminal validation loss",
        ["arm", "optimizer", "ratios", "base LR", *(["warm-up"] if warmups else []), "steps"]
        + [f"seed {seed}" for seed in seeds]
        + (["mean"] if len(seeds) > 1 else []),
        rows,
        text_columns=frozenset({0, 1, 2}),
        note="In nats per token, at the end of each run's own full schedule.",
    )


def lr_over_rms_table(content: Mapping[str, Any]) -> Table:
    """Return the table of every block's peak learning rate over the scale of its weights before training."""
    rms: Mapping[str, float] = content["initial_rms"]
    arms = content["arms"].items()
    rows = [
        ["RMS before training", *(f"{value:g}" for value in rms.values())],
        *([name, *(f"{arm['lr_over_initial_rms'][block]:.3g}" for block in rms)] for name, arm in arms),
    ]
    return Table(
        "Peak learning rate over initial scale",
        ["arm", *(block.upper() for block in rms)],
        rows,
        note="The scale of a block is the root mean square of its weights before training (first row). Rates of "
        "models that start at different scales compare as these quotients. Ratios that change during the run are "
        "those at its start.",
    )


def runs_table(content: Mapping[str, Any]) -> Table:
    """Return the table of all runs: those reported, those of the grid, and those of an earlier plan in the folder."""
    rows: dict[str, list[str]] = {}

    warmups = warmups_differ(content)

    def add(run: Mapping[str, Any], what: str, setting: Mapping[str, Any], val: Any, tune: Any) -> None:
        if run["run"] in rows:
            rows[run["run"]][1] += f", {what}"
            return
        time = "–" if run["seconds"] is None else format_seconds(run["seconds"])
        lr = float("nan") if setting["base_lr"] is None else setting["base_lr"]
        tuned = [f"{lr:g}", *([_percent(setting["warmup_fraction"])] if warmups else [])]
        losses = [format_loss(val), format_loss(tune)]
        rows[run["run"]] = [run["run"], what, str(run["seed"]), *tuned, *losses, time]

    for name, arm in content["arms"].items():
        for run in arm["seeds"]:
            add(run, name, arm, run["terminal_val_loss"], run["terminal_tune_loss"])
    for run in content["tuning"]:
        add(run, f"grid of {run['arm']}", run, run["val_loss"], run["tune_loss"])
    for run in content["other_runs"]:
        add(run, "earlier plan", run, run["val_loss"], run["tune_loss"])
    return Table(
        "Every run",
        ["run", "for", "seed", "base LR", *(["warm-up"] if warmups else []), "val loss", "tune loss", "time"],
        list(rows.values()),
        text_columns=frozenset({0, 1}),
        note=f"{'Settings' if warmups else 'Base learning rates'} are chosen by the tune loss alone; "
        "the validation loss is only reported.",
    )


def warmups_differ(content: Mapping[str, Any]) -> bool:
    """Return whether any arm has its own warm-up."""
    return any(arm["warmup_fraction"] is not None for arm in content["arms"].values())


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def facts_table(title: str, facts: Mapping[str, Any] | None) -> Table:
    """Return a table of nested facts, such as hardware or versions, with one fact per row."""
    return Table(title, ["", ""], [[key, value] for key, value in _flatten(facts or {})], frozenset({0, 1}))


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None and value != "":
            yield f"{prefix}{key}", str(value)


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown shows it literally, also in a table cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|!":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def markdown_table(table: Table) -> str:
    """Return the table in Markdown, without its title."""
    rule = [":--" if i in table.text_columns else "--:" for i in range(len(table.columns))]
    cells = [[escape_markdown(cell) for cell in row] for row in [table.columns, *table.rows]]
    lines = [f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]]]
    note = f"\n\n{escape_markdown(table.note)}" if table.note else ""
    return "\n".join(lines) + note


def print_summary(content: Mapping[str, Any], out: Path | str, console: Console | None = None) -> None:
    """Print the summary table, the answer, the warnings and the path of the report.

    Args:
        content: the return value of `compare`.
        out: the comparison's folder.
        console: where to print. Default: standard output.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    table = summary_table(content)
    shown = RichTable(
        title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for i, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    for row in table.rows:
        shown.add_row(*map(Text, row))  # rich would interpret brackets in a plain string as markup
    console.print(shown)
    console.print(Text(table.note, style="dim"))
    for sentence in content["answer"]:
        console.print(Text(sentence, style="bold"))
    for warning in content["warnings"]:
        console.print(Text(f"Note: {warning}"))
    console.print(Text(f"Report: {Path(out) / 'report.html'}"), soft_wrap=True)
