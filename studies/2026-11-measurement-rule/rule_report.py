"""Write the study's page and figure from the reports and the runs.

python studies/2026-11-measurement-rule/rule_report.py
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from blockwise_lr import DirectionalReport
from blockwise_lr.blocks import Block
from blockwise_lr.directional.ratio_display import draw_ratios
from blockwise_lr.directional.run_ratios import RunRatios
from blockwise_lr.drawing import block_colour, figure, save
from blockwise_lr.optim.ratios import MEASURED_RATIOS

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from arms import Arm
from choose_rule import (
    BLOCKS,
    CHOICES,
    CHOSEN,
    LARGE,
    MODELS,
    Choice,
    distance,
    leave_one_out,
    ratios,
    report_scatter,
    reports,
    search_spread,
)
from comparison_tables import other_settings, table
from gaps import gap, gap_cell, losses
from joint_rule import joint_ratios
from text_runs import load
from try_rule import SEEDS, ratios_of, tuning, with_horizon
from tuning import Results

from pages import write_pages

STUDY = Path(__file__).parent
RUNS = STUDY / "data" / "runs"
SMALL = [name for names in MODELS.values() for name in names]
FRESH = "llama-600k, technical English"
"""The set that try_rule.py measured after the rule had been fixed."""


def digits(value: float) -> str:
    """Two significant digits without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def sets() -> dict[str, tuple[list[DirectionalReport], RunRatios]]:
    """Return the reports and the ratios of every set; the fresh one once it has been measured."""
    found = {name: (along, ratios(name)) for name, along in reports().items()}
    path = STUDY / "data" / "measured" / "llama-600k.json"
    if path.exists():
        along = [DirectionalReport.from_dict(each) for each in json.loads(path.read_text())["reports"]]
        found[FRESH] = (along, DirectionalReport.ratios_of_run(along))
    return found


def table_of_sets() -> str:
    rows = []
    for name, (along, rule) in sets().items():
        earlier = joint_ratios(along)[0]
        for block in BLOCKS:
            if block in rule:
                low, high = rule.interval(block)
                alone = f"{digits(rule.alone[block])} ({digits(low)} to {digits(high)})"
                left = "not determined" if block in rule.undetermined else ""
                rows.append(
                    [name, block.value.upper(), digits(earlier[block]), alone, digits(rule[block]),
                     digits(MEASURED_RATIOS[block]), left]
                )  # fmt: skip
    return table(["reports", "block", "earlier rule", "reports alone", "the rule", "won", ""], rows)


def table_of_choices() -> str:
    best = sorted(CHOICES, key=lambda choice: distance(SMALL, choice))
    rows = [
        [f"{choice.damping:g}", f"{choice.low:g} to {choice.high:g}", f"{distance(SMALL, choice):.2f}"]
        for choice in best
        if (choice.low, choice.high) == (CHOSEN.low, CHOSEN.high) or choice.damping == CHOSEN.damping
    ]
    return table(["damping", "bounds", "distance on the small models"], rows)


def table_of_left_out() -> str:
    rows = []
    for model, names in MODELS.items():
        choice, found = leave_one_out(model)
        worst = max(
            (abs(ratios_log(name, block, choice)), block.value.upper())
            for name in names
            for block in BLOCKS
            if block in ratios(name)
        )
        rows.append(
            [model, f"{choice.damping:g}", f"{choice.low:g} to {choice.high:g}", f"{found:.2f}",
             f"x{2 ** worst[0]:.1f}", worst[1]]
        )  # fmt: skip
    return table(["left out", "damping", "bounds", "distance on it", "farthest block", ""], rows)


def ratios_log(name: str, block: Block, choice: Choice) -> float:
    """Return how far the reports of a set alone put a block from the ratio that won, in powers of 2."""
    return math.log2(ratios(name, choice).alone[block] / MEASURED_RATIOS[block])


def table_of_large() -> str:
    rows = []
    for damping in sorted({choice.damping for choice in CHOICES}):
        found = ratios(LARGE, Choice(damping, CHOSEN.low, CHOSEN.high))
        cells = [digits(found[block]) + "*" * (block in found.undetermined) for block in BLOCKS]
        rows.append([f"{damping:g}", *cells])
    return table(["damping", *(block.value.upper() for block in BLOCKS)], rows)


def table_of_few() -> str:
    rows = []
    for what, part in (
        ("the last two", slice(-2, None)),
        ("every fifth", slice(4, None, 5)),
        ("all", slice(None)),
    ):
        for name in ("llama-2m", "four-times-steps"):
            along = reports()[name][part]
            found, earlier = DirectionalReport.ratios_of_run(along), joint_ratios(along)[0]
            cells = [
                f"{digits(found[block])}{'*' * (block in found.undetermined)} / {digits(earlier[block])}"
                for block in BLOCKS
            ]
            rows.append([name, what, str(len(along)), *cells])
    return table(["reports", "which", "number", *(block.value.upper() for block in BLOCKS)], rows)


def table_of_constants() -> str:
    spread = search_spread()
    rows = [
        ["spread of nearly best runs", *(f"x{2 ** spread[block.value]:.1f}" for block in BLOCKS)],
        *(
            [f"scatter of one report, {name}", *(f"x{found[b]:.1f}" if b in found else "" for b in BLOCKS)]
            for name, found in ((name, report_scatter(name)) for name in SMALL)
        ),
    ]
    return table(["", *(block.value.upper() for block in BLOCKS)], rows)


def tuned(results: Results) -> dict[str, Arm]:
    """Return what was chosen for every rule whose tuning has ended."""
    found = {rule: tuning(rule, results)[1] for rule in ratios_of()}
    return {rule: arm for rule, arm in found.items() if arm is not None}


def table_of_trained_ratios() -> str:
    blocks = (Block.EMB, Block.QK, Block.FFN, Block.VO, Block.NORM, Block.HEAD)
    rows = [
        [rule, *(digits(ratios.get(block.value, 1.0)) for block in blocks)]
        for rule, ratios in ratios_of().items()
    ]
    return table(["ratios", *(block.value.upper() for block in blocks)], rows)


def table_of_trained() -> str:
    """Return what was chosen for every rule, and what it wins over uniform and over `measured` at equal seeds."""
    runs = with_horizon(load(RUNS))
    chosen = tuned(runs)
    vals = {rule: losses(arm, runs, SEEDS) for rule, arm in chosen.items()}
    rows = []
    for rule in ratios_of():
        if rule not in chosen:
            rows.append([rule, *("not tuned yet",) * 3, *("-",) * 3])
            continue
        arm = chosen[rule]
        won = [
            "-" if rule == other or other not in vals else gap_cell(gap(vals[other], vals[rule]), len(SEEDS))
            for other in ("uniform", "measured")
        ]
        mean = sum(vals[rule].values()) / len(vals[rule])
        rows.append(
            [rule, f"{arm.base_lr:g}", f"{arm.warmup:.0%}", other_settings(arm) or "-", f"{mean:.3f}", *won]
        )
    return table(
        ["ratios", "base LR", "warm-up", "else", "val loss", "nats won over uniform", "over `measured`"], rows
    )


def draw(path: Path) -> None:
    """Draw the ratio of every block in every set by both rules."""
    found = sets()
    rows = (len(found) + 2) // 3
    with figure((13.5, 3.7 * rows)) as made:
        panels = made.subplots(rows, 3, squeeze=False).flatten()
        for axes, (name, (along, rule)) in zip(panels, found.items()):
            draw_ratios(axes, rule)
            earlier = joint_ratios(along)[0]
            for at, block in enumerate(rule):
                axes.plot(
                    [at - 0.25], [earlier[block]], marker="x", color=block_colour(block), linestyle="none"
                )
            axes.set_title(name, fontsize=9, loc="left")
            axes.set_ylim(0.05, 200)
        for axes in panels[len(found) :]:
            axes.set_visible(False)
        made.suptitle(
            "ratio over FFN's: ● by the reports alone, 95 % (hollow: not determined), ◀ by the rule, × by the earlier "
            "rule, — won",
            fontsize=9,
        )
        save(made, path)


def tables() -> dict[str, str]:
    """Return the tables of the page by name."""
    return {
        "sets": table_of_sets(),
        "choices": table_of_choices(),
        "left_out": table_of_left_out(),
        "large": table_of_large(),
        "few": table_of_few(),
        "constants": table_of_constants(),
        "trained_ratios": table_of_trained_ratios(),
        "trained": table_of_trained(),
        "number_of_choices": str(len(CHOICES)),
    }


def main() -> None:
    write_pages(STUDY, tables(), pages=("README",))
    draw(STUDY / "ratios-by-rule.png")


if __name__ == "__main__":
    main()
