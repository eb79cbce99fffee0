"""The tables in the report of a sweep over ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwise_lr.compare.comparison_progress import format_seconds
from blockwise_lr.compare.ratio_sweeps import TOLERANCE
from blockwise_lr.compare.report_facts import what_was_run
from blockwise_lr.compare.sweep_wording import (
    blocks_in_order,
    format_edge,
    format_edges_by_seed,
    how_tuned,
)
from blockwise_lr.compare.tables import Table
from blockwise_lr.compare.wording import format_interval, format_loss, format_signed
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.presets import Setting
from blockwise_lr.train.ratio_text import parse_ratios

_TITLES = {
    "robustness": "how far each ratio can move",
    "ablation": "blocks switched on one after another, in both orders",
}


def sweep_title(content: Mapping[str, Any]) -> str:
    """Return the title of the report."""
    return f"{content['kind'].capitalize()}: {_TITLES[content['kind']]}"


def sweep_tables(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables of the report by section; one that does not apply has no rows."""
    seeds, config = content["seeds"], content["config"]
    run = {
        "preset": content["preset"],
        "steps": f"{content['steps']:,}",
        "ratios": content["ratios"],
        "optimizer": content["optimizer"],
        "seeds": ", ".join(map(str, seeds)),
        "base learning rate": how_tuned(content),
        "sequences per step (each process)": config["batch_size"] * config["accumulation"],
        "precision": config["precision"],
        "date": content["date"],
        "training time, summed over runs": format_seconds(content["seconds"]),
    }
    varied = {"optimizer", "ratios", "base_lr"}
    if content["warmups"] or any(run["warmup_fraction"] is not None for run in content["runs"]):
        varied |= {"warmup_fraction", "warmup_steps"}
    return {
        "widths": _widths_table(content),
        "worth": _worth_table(content),
        "arms": _arms_table(content),
        "runs": _runs_table(content),
        **what_was_run(content, run, {content["optimizer"]}, varied),
    }


def _ratio_of(content: Mapping[str, Any], block: str) -> str:
    ratios = {each.value: ratio for each, ratio in resolve_ratios(parse_ratios(content["ratios"])).items()}
    return f"{ratios[block]:g}" if block in ratios else "–"


def _widths_table(content: Mapping[str, Any]) -> Table:
    several = len(content["seeds"]) > 1
    rows = []
    for curve, width in content["widths"].items():
        row = [curve, _ratio_of(content, curve)]
        for side in ("low", "high"):
            row.append(format_edge(width, side))
            row += [format_edges_by_seed(width, side)] if several else []
        rows.append(row)
    by_seed = ["over seeds"] if several else []
    return Table(
        f"How far a ratio can move for {TOLERANCE:g} nats",
        ["ratio of", "ratio", "smallest factor", *by_seed, "largest factor", *by_seed],
        rows,
        note=f"The factors at which the mean loss has risen by {TOLERANCE:g} nats, interpolated between those that "
        "were run. ≤ and ≥: the valley is wider than the sweep, or ends before a run that diverged."
        + (" Over seeds: the same from each seed alone, smallest to largest." if several else ""),
    )


def _worth_table(content: Mapping[str, Any]) -> Table:
    worth = content["worth"]
    rows = [
        [block, _ratio_of(content, block)]
        + [
            cell
            for blocks in worth.values()
            for cell in (
                format_signed(blocks[block]["mean"]),
                format_interval(blocks[block]["ci95"], signed=True),
            )
        ]
        for block in (blocks_in_order(worth) if worth else ())
    ]
    return Table(
        "What each block's ratio wins",
        ["block", "ratio", *(cell for order in worth for cell in (order, "95 % CI"))],
        rows,
        note="The loss before the block is switched on minus the loss after it, in nats per token, paired by seed; "
        "positive is a gain. In each order, the blocks before it are on. If a block wins more when it comes first, "
        "its ratio does in part what another block's ratio does.",
    )


def _arms_table(content: Mapping[str, Any]) -> Table:
    robustness = content["kind"] == "robustness"
    rows = [
        [
            point["arm"], point["ratios"].replace(",", ", "), point["setting"], format_loss(point["loss"]),
            format_signed(point["cost"]["mean"]), format_interval(point["cost"]["ci95"], signed=True),
        ]
        for point in content["points"]
    ]  # fmt: skip
    baseline = content["baseline"]
    if baseline["arm"] not in {point["arm"] for point in content["points"]}:
        gain = baseline["gain"]
        rows.append([
            baseline["arm"], "uniform", baseline["setting"], format_loss(baseline["loss"]),
            format_signed(gain["mean"]), format_interval(gain["ci95"], signed=True),
        ])  # fmt: skip
    return Table(
        "Every arm",
        ["arm", "ratios", "setting", "loss", "rise", "95 % CI"],
        rows,
        frozenset({0, 1, 2}),
        "Loss: terminal validation loss in nats per token, mean over seeds. Rise: the loss minus that of "
        + ("the unscaled ratios" if robustness else "uniform ratios")
        + ", paired by seed"
        + ("." if robustness else "; negative is a gain."),
    )


def _runs_table(content: Mapping[str, Any]) -> Table:
    rows: dict[str, list[str]] = {}
    for what, runs in (("{}", content["runs"]), ("grid of {}", content["tuning"])):
        for run in runs:
            arm = what.format(run["arm"])
            if run["run"] in rows:
                rows[run["run"]][1] += f", {arm}"
                continue
            time = "–" if run["seconds"] is None else format_seconds(run["seconds"])
            setting = str(Setting(run["base_lr"], run["warmup_fraction"]))
            losses = [format_loss(run["val_loss"]), format_loss(run["tune_loss"])]
            rows[run["run"]] = [run["run"], arm, str(run["seed"]), setting, *losses, time]
    return Table(
        "Every run",
        ["run", "for", "seed", "setting", "val loss", "tune loss", "time"],
        list(rows.values()),
        text_columns=frozenset({0, 1, 3}),
        note="Settings are chosen by the tune loss alone; the validation loss is only reported.",
    )
