"""The section of details.md on four times the steps, from data/four-times-steps.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from blockwise_lr.compare.over_seeds import loss_gap
from blockwise_lr.compare.speedup import decayed_speedup

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from comparison_tables import table

Runs = list[dict[str, Any]]


def section_on_four_times_steps(found: dict[str, Any], before: dict[str, Any]) -> str:
    """Compare every rule with uniform over more steps, and list all runs.

    Args:
        found: four-times-steps.json.
        before: compare.json of the same setting over fewer steps.
    """
    rules = {rule: runs_of(found["runs"], rule) for rule in dict.fromkeys(map(rule_of, found["runs"]))}
    chosen = {rule: each_seed(runs) for rule, runs in rules.items()}
    few, steps = before["steps"], found["steps"]
    header = (
        "rule", "nats won", f"steps to uniform's loss of {steps} steps", f"speed-up over {steps} steps",
        "lowest seed", "highest seed", f"speed-up over {few} steps",
    )  # fmt: skip
    won = table(header, [row_won(rule, chosen, steps, before) for rule in rules if rule != "uniform"])
    runs = table(
        ("rule", "base LR", "warm-up", "seed", "tune loss", "val loss"),
        [row(run, rule) for rule, runs in rules.items() for run in runs],
    )
    text = (
        f"`llama-2m` over {steps} steps, on {found['date'][:10]} on {found['hardware'].get('cpu')} "
        f"(`{found['command']}`). Nats are won against tuned uniform at equal steps, with 95 % intervals over seeds. "
        "Speed-ups are between fully decayed runs; a rule that was not trained over "
        f"{few} steps has none.\n\n"
        f"The speed-up over {steps} steps comes from a straight line in the logarithm of the steps, between the "
        f"rule's own runs of {few} and {steps} steps. It shows after how many steps the rule has uniform's loss. "
        "Losses fall less with every doubling. The straight line therefore makes the speed-up over more steps a "
        "little too low, and the one over fewer steps a little too high."
    )
    return f"{text}\n\n{won}\n\nAll runs, the chosen ones of each rule first:\n\n{runs}"


def rule_of(run: dict[str, Any]) -> str:
    return str(run["point"]["rule"])


def runs_of(runs: Runs, rule: str) -> Runs:
    return [run for run in runs if rule_of(run) == rule]


def each_seed(runs: Runs) -> Runs:
    """Return the chosen run of each seed; these come first."""
    return runs[: len({run["point"]["seed"] for run in runs})]


def row(run: dict[str, Any], name: str) -> list[str]:
    p = run["point"]
    shown = ["diverged" if run[loss] is None else f"{run[loss]:.3f}" for loss in ("tune_loss", "val_loss")]
    return [name, f"{p['base_lr']:g}", f"{p['warmup']:.0%}", str(p["seed"]), *shown]


def row_won(rule: str, chosen: dict[str, Runs], steps: int, before: dict[str, Any]) -> list[str]:
    """Return the row of a rule: what it wins, and after how many steps it reaches uniform's loss."""
    gap = loss_gap(*([run["val_loss"] for run in chosen[of]] for of in ("uniform", rule)))
    interval = "" if gap.ci95 is None else f" ({gap.ci95[0]:+.3f} to {gap.ci95[1]:+.3f})"
    cells = [f"`{rule}`", f"{gap.mean:+.3f}{interval}"]
    same = chosen[rule][0]["point"].get("ratios", rule) == rule
    few = before["arms"].get(rule) if same else None
    times = [] if few is None else speedups(few, chosen[rule], chosen["uniform"], steps)
    then = next((c["speedup_decayed"]["value"] for c in before["comparisons"] if c["arm"] == rule), None)
    if not times or then is None:
        return [*cells, *("" for _ in range(5))]
    mean = sum(times) / len(times)
    speeds = [f"{value:.2f}x" for value in (mean, min(times), max(times), then)]
    return [*cells, f"{steps / mean:.0f}", *speeds]


def speedups(few: dict[str, Any], fast: Runs, slow: Runs, steps: int) -> list[float]:
    """Return the speed-up of each seed; empty if one of them is only a bound."""
    ends = {seed["seed"]: seed["terminal_val_loss"] for seed in few["seeds"]}
    found = []
    for ours, theirs in zip(fast, slow, strict=True):
        losses = {few["steps"]: ends[ours["point"]["seed"]], steps: ours["val_loss"]}
        share = decayed_speedup(losses, theirs["val_loss"], steps)
        if share.bound != "exact" or share.value is None:
            return []
        found.append(1 / share.value)
    return found
