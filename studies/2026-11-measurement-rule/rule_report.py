"""Write the study's page and figure from the reports and the runs.

python studies/2026-11-measurement-rule/rule_report.py
"""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from blockwise_lr import DirectionalReport
from blockwise_lr.blocks import Block
from blockwise_lr.directional.ratio_display import draw_ratios
from blockwise_lr.directional.run_ratios import RunRatios
from blockwise_lr.drawing import block_colour, figure, save
from blockwise_lr.optim.ratios import MEASURED_RATIOS

sys.path.append(str(Path(__file__).parents[1] / "_support"))

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
from comparison_tables import table
from joint_rule import joint_ratios
from try_rule import ORDER, STEPS, results, rules, wanted

from pages import write_pages

STUDY = Path(__file__).parent
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


def trained(shape: str = "llama-600k") -> dict[str, list[dict[str, Any]]]:
    """Return the runs of every rule that have ended, best tune loss first."""
    arguments = Namespace(data=STUDY / "data", known=[], steps=STEPS)
    if not (STUDY / "data" / "measured" / f"{shape}.json").exists():
        return {}
    known, found = results(arguments), dict[str, list[dict[str, Any]]]()
    for rule, arm in wanted(shape, arguments, known):
        run = known.runs.get(arm.name)
        if run is not None and run not in found.setdefault(rule, []):
            found[rule].append(run)
    return {
        rule: sorted(runs, key=lambda run: (run["arm"]["seed"], run["tune_loss"] or 99))
        for rule, runs in found.items()
    }


def table_of_trained_ratios(shape: str = "llama-600k") -> str:
    if not trained(shape):
        return "No run has ended yet."
    given = rules(shape, Namespace(data=STUDY / "data"))
    blocks = (Block.EMB, Block.QK, Block.FFN, Block.VO, Block.NORM, Block.HEAD)
    rows = [[rule, *(digits(given[rule].get(block.value, 1.0)) for block in blocks)] for rule in ORDER]
    return table(["ratios", *(block.value.upper() for block in blocks)], rows)


def is_tuned(runs: list[dict[str, Any]]) -> bool:
    """Whether the best run, which comes first, has a worse base learning rate on both sides."""
    rates = {run["arm"]["base_lr"] for run in runs if run["arm"]["seed"] == 0}
    return min(rates) < runs[0]["arm"]["base_lr"] < max(rates)


def table_of_trained(shape: str = "llama-600k") -> str:
    rows = []
    for rule, runs in trained(shape).items():
        best = runs[0]
        rows.append(
            [rule, str(len(runs)), f"{best['arm']['base_lr']:g}", "yes" if is_tuned(runs) else "no",
             f"{best['arm']['warmup']:.0%}", f"{best['tune_loss']:.3f}", f"{best['val_loss']:.3f}"]
        )  # fmt: skip
    header = ["ratios", "runs", "best base LR", "worse on both sides", "warm-up", "tune loss", "val loss"]
    return table(header, rows)


def text_of_trained(shape: str = "llama-600k") -> str:
    """Return by how much the rules' val losses differ: tuned, or at the base learning rates that both have had."""
    found, lines = trained(shape), []
    for rule, other in (
        ("the rule", "measured"),
        ("the rule", "the earlier rule"),
        ("the rule", "uniform"),
        ("measured", "uniform"),
        ("embedding alone", "uniform"),
    ):
        if not (rule in found and other in found):
            continue
        ours, theirs = found[rule][0], found[other][0]
        where = "Each at its best rate"
        if not (is_tuned(found[rule]) and is_tuned(found[other])):
            both = [
                (a, b)
                for a in found[rule]
                for b in found[other]
                if key(a) == key(b) and a["arm"]["seed"] == 0
            ]
            if not both:
                continue
            ours, theirs = min(both, key=lambda pair: float(pair[0]["tune_loss"]))
            where = f"At a base learning rate of {ours['arm']['base_lr']:g}"
        gap = theirs["val_loss"] - ours["val_loss"]
        side = "below" if gap >= 0 else "above"
        lines.append(f"- {where}, `{rule}` ends {abs(gap):.3f} nats {side} `{other}`.")
    return "\n".join(lines) or "No two rules have been trained alike yet."


def key(run: dict[str, Any]) -> tuple[float, float]:
    """Return the base learning rate and the warm-up of a run."""
    return run["arm"]["base_lr"], run["arm"]["warmup"]


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
        "trained_text": text_of_trained(),
        "number_of_choices": str(len(CHOICES)),
    }


def main() -> None:
    write_pages(STUDY, tables(), pages=("README",))
    draw(STUDY / "ratios-by-rule.png")


if __name__ == "__main__":
    main()
