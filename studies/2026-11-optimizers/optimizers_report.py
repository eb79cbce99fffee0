"""Write README.md, details.md and the figure of this study from its data: `compare_optimizers.py report`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from blockwise_lr.compare.over_seeds import loss_gap
from blockwise_lr.drawing import figure, save, series_style

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from comparison_tables import comparisons, nats_won, speedup, speedup_of, table

from pages import write_pages

ADAMW = Path("2026-11-ratio-rules", "data", "llama-2m", "compare.json")
TITLES = {
    "adamw": "AdamW", "adam-mini": "Adam-mini", "lion": "Lion", "muon": "Muon", "wsd": "AdamW, WSD",
}  # fmt: skip
RULES = ("paper", "measured", "auto")


def write_report(study: Path) -> None:
    """Write the pages and the figure in the folder `study` from its data/ and the AdamW runs of the ratio rules."""
    data = study / "data"
    studies = {"adamw": read(study.parent / ADAMW)}
    studies |= {name: read(data / name / "compare.json") for name in TITLES if name != "adamw"}
    settings = read(data / "settings.json")
    draw_nats(studies, study / "nats-won-by-optimizer.png")
    tables = {
        "nats_won": table_of_nats(studies),
        "optimizers": table_of_optimizers(studies),
        "against_adamw": table_against_adamw(studies, read(data / "state.json")),
        "decay_and_clipping": table_of_settings(settings["runs"]),
        "commands": commands(studies, settings),
    }
    write_pages(study, tables)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def table_of_nats(studies: dict[str, Any]) -> str:
    """One row an optimizer: nats that each rule wins against this optimizer's own tuned uniform rate."""
    rows = [
        [TITLES[name], *(nats_won(comparisons(study).get(rule)) for rule in RULES)]
        for name, study in studies.items()
    ]
    return table(("optimizer", *(f"`{rule}`" for rule in RULES)), rows)


def table_of_optimizers(studies: dict[str, Any]) -> str:
    """One row an optimizer and rule: against the optimizer's own uniform baseline."""
    header = (
        "optimizer", "ratios", "base LR", "warm-up", "val loss", "nats won", "speed-up, the paper's",
        "speed-up, both decayed",
    )  # fmt: skip
    rows = []
    for name, study in studies.items():
        for rule in ("uniform", *RULES):
            if (arm := study["arms"].get(rule)) is None:
                continue
            found = comparisons(study).get(rule)
            own = [nats_won(found), speedup_of(found, "speedup"), speedup_of(found, "speedup_decayed")]
            if rule == "uniform":
                own = ["0", speedup(study["baseline_against_itself"]), "1x"]
            tuned = [f"{arm['base_lr']:g}", f"{arm['warmup_fraction']:.0%}", f"{mean(losses(arm)):.3f}"]
            rows.append([TITLES[name], rule, *tuned, *own])
    return table(header, rows)


def table_against_adamw(studies: dict[str, Any], state: dict[str, int]) -> str:
    """One row an optimizer and rule: nats won against uniform AdamW, seconds and optimizer state."""
    reference = studies["adamw"]["arms"]["uniform"]
    rows = []
    for name, study in studies.items():
        for rule in ("uniform", *RULES):
            if (arm := study["arms"].get(rule)) is None:
                continue
            won = "" if arm is reference else gap(losses(reference), losses(arm))
            seconds = median(seed["seconds"] for seed in arm["seeds"])
            share = f"{state[arm['optimizer']] / state['adamw']:.2f}" if arm["optimizer"] in state else ""
            rows.append([TITLES[name], rule, won, f"{seconds:.0f}", share])
    return table(("optimizer", "ratios", "nats won", "seconds a run", "state over AdamW's"), rows)


def draw_nats(studies: dict[str, Any], path: Path) -> None:
    """One row an optimizer, one mark a rule: nats won against its own uniform rate, with the interval."""
    with figure((5.0, 3.4)) as made:
        axes = made.add_subplot()
        for i, rule in enumerate(RULES):
            gaps = [comparisons(study).get(rule, {}).get("loss_gap") for study in studies.values()]
            rows = [row for row, found in enumerate(gaps) if found]
            won = [found["mean"] for found in gaps if found]
            error = [found["ci95"][1] - found["mean"] for found in gaps if found]
            at = [row + 0.2 * (i - 1) for row in rows]
            colour = series_style(i)["color"]
            axes.errorbar(won, at, xerr=error, fmt="o", color=colour, capsize=2, markersize=4, label=rule)
        axes.axvline(0, color="#333333", linewidth=0.8)
        axes.set_yticks(range(len(studies)), [TITLES[name] for name in studies])
        axes.invert_yaxis()
        axes.set_xlabel("nats won against its own uniform rate (95 % intervals)")
        axes.legend(loc="lower right")
        save(made, path)


def losses(arm: dict[str, Any]) -> list[float]:
    """Return the terminal validation loss of each seed; infinite for a diverged run."""
    found = [seed["terminal_val_loss"] for seed in arm["seeds"]]
    return [float("inf") if loss is None else loss for loss in found]


def gap(baseline: Sequence[float], other: Sequence[float]) -> str:
    """Return the nats won, with the 95 % interval over paired seeds."""
    if float("inf") in other:
        return "diverged"
    found = loss_gap(baseline, other)
    interval = "" if found.ci95 is None else f" ({found.ci95[0]:+.3f} to {found.ci95[1]:+.3f})"
    return f"{found.mean:+.3f}{interval}"


def table_of_settings(runs: list[dict[str, Any]]) -> str:
    """One row a variant: its seeds at the base learning rate that was chosen for it, against the first variant's."""
    variants = list(dict.fromkeys(run["point"]["variant"] for run in runs))
    chosen = {variant: [run for run in runs if run["point"]["variant"] == variant] for variant in variants}
    seeds = sorted({run["point"]["seed"] for run in runs})
    rows = []
    reference: list[float] = []
    for variant, tried in chosen.items():
        at = tried[: len(seeds)]
        found = [float("inf") if run["val_loss"] is None else run["val_loss"] for run in at]
        reference = reference or found
        won = "" if variant == variants[0] else gap(reference, found)
        rows.append([variant, f"{at[0]['point']['base_lr']:g}", f"{mean(found):.3f}", won])
    return table(("variant", "base LR", "val loss", "nats won against the first"), rows)


def commands(studies: dict[str, Any], settings: dict[str, Any] | None) -> str:
    """List how, when and on what each comparison was run, with its warnings about the grid's edge."""
    parts = []
    for name, study in studies.items():
        folder = "../2026-11-ratio-rules/data/llama-2m" if name == "adamw" else f"data/{name}"
        seeds = ", ".join(map(str, study["seeds"]))
        about = f"**{TITLES[name]}** ([figures]({folder}/report.md)): {study['steps']} steps, seeds {seeds}"
        parts.append(f"{about}, {on(study)}")
        parts += [warning for warning in study["warnings"] if "edge" in warning and name != "adamw"]
    if settings:
        parts.append(f"**Decay and clipping**: {on(settings)}")
    return "\n\n".join(parts)


def on(study: dict[str, Any]) -> str:
    """When and where something was run, and its command in a block of its own."""
    return f"on {study['date'][:10]} on {study['hardware'].get('cpu')}.\n\n```\n{study['command']}\n```"
