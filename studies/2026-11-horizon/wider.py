"""What the ratios that were searched on the smallest model win at four times its width."""

from __future__ import annotations

from comparison_tables import table
from gaps import gap, gap_cell, losses
from rules import SEEDS, WIDER, carried
from tuned import SEARCHED, Tuned
from tuning import Results

NARROW = "llama-600k"
WIDE = {WIDER[0]: "5.8M"}


def carried_arms(found: dict[tuple[str, int, str], Tuned], results: Results) -> dict[str, Tuned]:
    """Return the rules whose base learning rate is tuned at four times the width, by name."""
    steps = WIDER[1]
    every = {}
    for rule in ("uniform", "half", "measured", SEARCHED):
        if (narrow := found.get((NARROW, steps, rule))) is None:
            continue
        best = carried(narrow.arm, results)[1]
        if best is not None:
            every[rule] = Tuned(best, losses(best, results, SEEDS[steps]))
    return every


def wider_table(found: dict[tuple[str, int, str], Tuned], results: Results) -> str:
    """One row a rule: its base learning rate and val loss at four times the width, and what it wins over uniform."""
    every = carried_arms(found, results)
    rows = []
    for rule, each in every.items():
        mean = sum(each.losses.values()) / len(each.losses)
        won = (
            gap_cell(gap(every["uniform"].losses, each.losses), len(each.losses))
            if rule != "uniform" and "uniform" in every
            else "-"
        )
        rows.append([rule, f"{each.arm.base_lr:.2g}", f"{mean:.3f}", won])
    return table(["ratios", "base LR", "val loss", "nats won over uniform"], rows)
