"""When the runs of one length learn to copy tokens that come again in a window, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison_tables import table, thousands
from tuned import MODELS, Tuned
from tuning import Results

from blockwise_lr import drawing

SHAPE, STEPS = "llama-600k", 4800
"""The runs that are drawn: the longest of which several rules have several seeds."""
COPIES = 0.5
"""Nats from which on a model counts as one that copies."""

Found = dict[tuple[str, int, str], Tuned]


def _runs(found: Found, results: Results, again: Results) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (rule, seed, run) of every rule with settled settings, and the runs that were made again."""
    for (shape, steps, rule), tuned in found.items():
        if (shape, steps) == (SHAPE, STEPS):
            for seed in tuned.losses:
                name = replace(tuned.arm, seed=seed).name
                yield rule, f"{seed}", results.runs[name]
                if name in again.runs:
                    yield rule, f"{seed}, again", again.runs[name]


def draw_copying(found: Found, results: Results, again: Results, path: Path) -> bool:
    """Draw how much every run copies against its steps, and its val loss against how much it copies at the end.

    Returns:
        Whether there is anything to draw.
    """
    runs = [(rule, seed, run) for rule, seed, run in _runs(found, results, again) if run.get("copying")]
    if not runs:
        return False
    rules = list(dict.fromkeys(rule for rule, _, _ in runs))
    with drawing.figure((7.2, 4.4)) as made:
        along, ends = made.subplots(1, 2)
        for number, rule in enumerate(rules):
            style = drawing.series_style(number)
            own = [run for each, _, run in runs if each == rule]
            for run in own:
                along.plot(*zip(*run["copying"]), **style)
            ends.plot(
                [run["copying"][-1][1] for run in own],
                [run["val_loss"] for run in own],
                label=rule,
                **style | {"linestyle": "none", "marker": "o^sDvP"[number]},
            )
        along.set_xlabel(f"steps, of {thousands(STEPS)} in all")
        along.set_ylabel("nats won by copying")
        ends.set_xlabel("nats won by copying, at the end")
        ends.set_ylabel("val loss in nats")
        made.suptitle(f"LLaMA of {MODELS[SHAPE]} parameters: a line and a mark a run")
        made.legend(*ends.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
        drawing.save(made, path)
    return True


def copying_table(found: Found, results: Results, again: Results) -> str:
    """One row a run: where it ends, how much it copies, and from which step on."""
    rows = []
    for rule, seed, run in _runs(found, results, again):
        curve = run.get("copying") or []
        begins = next((f"{step}" for step, gain in curve if gain is not None and gain >= COPIES), "never")
        rows.append(
            [
                rule,
                seed,
                f"{run['val_loss']:.3f}",
                f"{curve[-1][1]:.2f}" if curve else "not measured",
                begins if curve else "-",
            ]
        )
    return table(["rule", "seed", "val loss", "nats won by copying", f"{COPIES:g} nats at step"], rows)


def copying_sentence(found: Found, results: Results, again: Results) -> str:
    """Say at which losses the runs end that copy, and those that do not; empty while there are not both."""
    runs = [run for _, _, run in _runs(found, results, again) if run.get("copying")]
    copies = sorted(run["val_loss"] for run in runs if run["copying"][-1][1] >= COPIES)
    others = sorted(run["val_loss"] for run in runs if run["copying"][-1][1] < COPIES)
    if not copies or not others:
        return ""
    return (
        f"Of the {len(runs)} runs with this measurement, the {len(copies)} that win {COPIES:g} nats or more by copying "
        f"end at val losses of {copies[0]:.2f} to {copies[-1]:.2f}, the other {len(others)} at {others[0]:.2f} to "
        f"{others[-1]:.2f}."
    )
