"""results/optimizers/README.md: blockwise learning rates in each optimizer, and decay and clipping with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from ratios_report import comparisons, gap_cell, speedup

from blockwise_lr.compare.speedup import loss_gap
from blockwise_lr.files import write_text_atomic

TITLES = {
    "adamw": "AdamW", "adam-mini": "Adam-mini", "lion": "Lion", "muon": "Muon", "wsd": "AdamW, WSD",
}  # fmt: skip


def write_report(results: Path) -> None:
    """README.md in `results`, from README.head.md and what is there of the studies."""
    studies = {"adamw": read(results.parent / "ratios" / "llama-2m" / "compare.json")}
    studies |= {
        path.parent.name: read(path) for name in TITLES for path in results.glob(f"{name}/compare.json")
    }
    state = read(results / "state.json") if (results / "state.json").exists() else {}
    sections = [(results / "README.head.md").read_text(encoding="utf-8").rstrip()]
    sections += ["## Optimizers", table_of_optimizers(studies, state)]
    settings = read(results / "settings.json") if (results / "settings.json").exists() else None
    if settings:
        sections += ["## Decay and clipping", table_of_settings(settings["runs"])]
    sections += ["## Commands", commands(studies, settings)]
    write_text_atomic(results / "README.md", "\n\n".join(sections) + "\n")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def table_of_optimizers(studies: dict[str, Any], state: dict[str, int]) -> str:
    """One row an optimizer and rule: against its own uniform baseline, and against AdamW's."""
    lines = [
        "In brackets the speed-up by the paper's measure, and between fully decayed runs.",
        "",
        "| optimizer | ratios | base LR | warm-up | val loss | nats won against its own uniform rate | "
        "against uniform AdamW | seconds a run | state / AdamW's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    reference = losses(studies["adamw"]["arms"]["uniform"])
    for name, study in studies.items():
        for rule in ("uniform", "paper", "measured", "auto"):
            if (arm := study["arms"].get(rule)) is None:
                continue
            itself = f"0 [{speedup(study['baseline_against_itself'])}, 1x]"
            own = itself if rule == "uniform" else gap_cell(comparisons(study).get(rule))
            against = "-" if arm is studies["adamw"]["arms"]["uniform"] else gap(reference, losses(arm))
            seconds = median(seed["seconds"] for seed in arm["seeds"])
            share = state[arm["optimizer"]] / state["adamw"] if arm["optimizer"] in state else None
            lines.append(
                f"| {TITLES[name]} | {rule} | {arm['base_lr']:g} | {arm['warmup_fraction']:.0%} | "
                f"{mean(losses(arm)):.3f} | {own} | {against} | {seconds:.0f} | "
                f"{'' if share is None else f'{share:.2f}'} |"
            )
    return "\n".join(lines)


def losses(arm: dict[str, Any]) -> list[float]:
    """The validation loss of each seed at the end; a diverged run's is infinite."""
    found = [seed["terminal_val_loss"] for seed in arm["seeds"]]
    return [float("inf") if loss is None else loss for loss in found]


def gap(baseline: Sequence[float], other: Sequence[float]) -> str:
    """Nats won, with the 95 % interval over seeds that were paired."""
    if float("inf") in other:
        return "diverged"
    found = loss_gap(baseline, other)
    interval = "" if found.ci95 is None else f" ({found.ci95[0]:+.3f} .. {found.ci95[1]:+.3f})"
    return f"{found.mean:+.3f}{interval}"


def table_of_settings(runs: list[dict[str, Any]]) -> str:
    """One row a variant: its seeds at the base learning rate that was chosen for it, against the first variant's."""
    variants = list(dict.fromkeys(run["point"]["variant"] for run in runs))
    chosen = {variant: [run for run in runs if run["point"]["variant"] == variant] for variant in variants}
    seeds = sorted({run["point"]["seed"] for run in runs})
    lines = [
        "| variant | base LR | val loss | nats won against the first |",
        "| --- | --- | --- | --- |",
    ]
    reference: list[float] = []
    for variant, tried in chosen.items():
        at = tried[: len(seeds)]
        found = [float("inf") if run["val_loss"] is None else run["val_loss"] for run in at]
        reference = reference or found
        lines.append(
            f"| {variant} | {at[0]['point']['base_lr']:g} | {mean(found):.3f} | "
            f"{'-' if variant == variants[0] else gap(reference, found)} |"
        )
    return "\n".join(lines)


def commands(studies: dict[str, Any], settings: dict[str, Any] | None) -> str:
    """How each comparison was run, when and on what; and what it says of itself."""
    lines = []
    for name, study in studies.items():
        folder = "../ratios/llama-2m" if name == "adamw" else name
        lines.append(
            f"- {TITLES[name]} ([figures]({folder}/report.md)): {study['steps']} steps, "
            f"seeds {', '.join(map(str, study['seeds']))}, {on(study)}"
        )
        lines += [f"  - {warning}" for warning in study["warnings"] if "edge" in warning and name != "adamw"]
    if settings:
        lines.append(f"- Decay and clipping: {on(settings)}")
    return "\n".join(lines)


def on(study: dict[str, Any]) -> str:
    return f"{study['date'][:10]}, {study['hardware'].get('cpu')}: `{study['command']}`"
