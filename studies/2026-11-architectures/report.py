"""Write README.md, details.md and the figures from the runs in data/runs and the measurements in data/sharpness.

python studies/2026-11-architectures/report.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import models
from arms import RULES, Arm
from comparison_tables import table
from found_ratios import found_ratios
from gaps import gap, gap_cell, losses
from plan import DENSE, SEEDS, SHAPES, SPACES, expert_arms, search, tuning
from run import RESULTS
from text_runs import load
from tuning import Results

from blockwise_lr import DirectionalReport, SharpnessReport, drawing
from blockwise_lr.blocks import Block
from blockwise_lr.directional.run_ratios import RunRatios
from pages import write_pages

HERE = Path(__file__).parent
SHARPNESS = HERE / "data" / "sharpness"
NAMES = {**models.NAMES, DENSE: "LLaMA (dense)"}
SEARCHED_ON = {"mamba-2": "mamba-2-parts"}
"""Where the search of a model trains it under another name."""


def chosen(results: Results) -> dict[tuple[str, str], Arm]:
    """Return what was chosen, by model and rule, "searched" among them, where its tuning has ended."""
    found = {(shape, rule): tuning(shape, rule, results)[1] for shape in SHAPES for rule in RULES}
    for shape in SHAPES:
        if (under := SEARCHED_ON.get(shape, shape)) in SPACES:
            found[shape, "searched"] = search(under, results)[1]
    return {key: arm for key, arm in found.items() if arm is not None}


def gains_table(results: Results) -> str:
    """One row a model: the tuned uniform val loss, and what every rule wins over it."""
    found = chosen(results)
    others = [*(rule for rule in RULES if rule != "uniform"), "searched"]
    rows = []
    for shape in SHAPES:
        if (shape, "uniform") not in found:
            continue
        uniform = losses(found[shape, "uniform"], results, SEEDS)
        cells = []
        for rule in others:
            arm = found.get((shape, rule))
            own = {} if arm is None else losses(arm, results, SEEDS)
            cells.append(gap_cell(gap(uniform, own), len(own)) if own else "-")
        rows.append([NAMES[shape], f"{sum(uniform.values()) / len(uniform):.3f}", *cells])
    return table(["model", "uniform: val loss", *others], rows)


def settings_table(results: Results) -> str:
    """One row a model: the base learning rate and warm-up that were chosen for every rule."""
    found = chosen(results)
    rules = [*RULES, "searched"]
    rows = [
        [
            NAMES[shape],
            *(
                f"{arm.base_lr:.2g}, {arm.warmup:.0%}" if (arm := found.get((shape, rule))) else "-"
                for rule in rules
            ),
        ]
        for shape in SHAPES
        if (shape, "uniform") in found
    ]
    return table(["model", *rules], rows)


def searched_table(results: Results) -> str:
    """One row a search: the base learning rate, and every block's ratio with its valley."""
    blocks = list(dict.fromkeys(block for space in SPACES.values() for block in space.blocks))
    rows = []
    for shape, space in SPACES.items():
        arms, best = search(shape, results)
        if best is not None:
            tuned_on = next((model for model, under in SEARCHED_ON.items() if under == shape), shape)
            starts = [tuning(tuned_on, rule, results)[1] for rule in ("uniform", "half", "measured")]
            arms += [replace(arm, shape=shape) for arm in starts if arm is not None]
            each = found_ratios(best, arms, space, results)
            cells = [each.cell(block) if block in space.blocks else "-" for block in blocks]
            rows.append([NAMES[shape], space.reference.upper(), f"{best.base_lr:.2g}", *cells])
    return table(["model", "over", "base LR", *(block.upper() for block in blocks)], rows)


def experts_table(results: Results) -> str:
    """One row a change: what it wins over `half` in the mixture of experts and in the dense model."""
    found = {shape: expert_arms(shape, results) for shape in ("mixtral", DENSE)}
    rows = []
    for name in dict.fromkeys(name for arms in found.values() for name in arms if name != "half"):
        cells = []
        for arms in found.values():
            own = losses(arms[name], results, SEEDS) if name in arms else {}
            cells.append(gap_cell(gap(losses(arms["half"], results, SEEDS), own), len(own)) if own else "-")
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    return table(["change", *(NAMES[shape] for shape in found)], rows)


@dataclass(frozen=True)
class Measured:
    """What was measured along one run: each block's average sharpness by step, and the ratios that follow."""

    sharpness: list[tuple[int, dict[Block, float]]]
    ratios: RunRatios


def measured(folder: Path = SHARPNESS) -> dict[str, Measured]:
    """Return what was measured, by model."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        reports = [DirectionalReport.from_dict(each["report"]) for each in content["directional"]]
        sharpness = [
            (each["step"], {b: e.mean for b, e in SharpnessReport.from_dict(each["report"]).items()})
            for each in content["sharpness"]
        ]
        found[path.stem] = Measured(sharpness, DirectionalReport.ratios_of_run(reports))
    return found


def own_table(found: Mapping[str, Measured]) -> str:
    """One row a model: the ratios of its own measurement; an asterisk where it does not determine one."""
    blocks = [b for b in Block if any(b in each.ratios for each in found.values())]
    rows = []
    for shape, each in found.items():
        own = each.ratios
        cells = [f"{own[b]:.2g}{'*' * (b in own.undetermined)}" if b in own else "-" for b in blocks]
        rows.append([NAMES[shape], own.anchor.value.upper(), *cells])
    return table(["model", "over", *(block.value.upper() for block in blocks)], rows)


def sharpness_table(found: Mapping[str, Measured]) -> str:
    """One row a model and step: each block's sharpness over that of EMB."""
    blocks = [b for b in Block if any(b in v for each in found.values() for _, v in each.sharpness)]
    rows = []
    for shape, each in found.items():
        for step, values in each.sharpness:
            cells = [f"{values[b] / values[Block.EMB]:.2g}" if b in values else "-" for b in blocks]
            rows.append([NAMES[shape], str(step), *cells])
    return table(["model", "step", *(block.value.upper() for block in blocks)], rows)


def draw_sharpness(found: Mapping[str, Measured], path: Path) -> None:
    """Draw each block's average sharpness along the uniform run, a panel a model."""
    if not found:
        return
    with drawing.figure((3.6 * max(2, len(found)), 4.0)) as made:
        panels = made.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (shape, each) in zip(panels, found.items()):
            steps = [step for step, _ in each.sharpness]
            for number, block in enumerate(b for b in Block if b in each.sharpness[0][1]):
                values = [at[block] for _, at in each.sharpness]
                style = drawing.series_style(number) | {"color": drawing.block_colour(block)}
                axes.plot(steps, values, label=block.value.upper(), **style)
            axes.set_title(NAMES[shape])
            axes.set_xlabel("step")
            axes.set_yscale("log")
            axes.legend(fontsize="small", ncols=2)
        panels[0].set_ylabel("average sharpness tr(H)/#")
        drawing.save(made, path)


def runs_table(results: Results) -> str:
    """Every run, in the order of model, ratios, learning rate and seed."""
    rows = []
    for run in results.runs.values():
        arm = Arm(**run["arm"])
        ratios = ", ".join(f"{block} {ratio:g}" for block, ratio in arm.ratios.items()) or "uniform"
        ends = "" if arm.floor == "shared" else f"floor {arm.floor}"
        shown = ["diverged" if run[k] is None else f"{run[k]:.4f}" for k in ("tune_loss", "val_loss")]
        key = (list(NAMES).index(arm.shape), ratios, ends, arm.base_lr, arm.warmup, arm.seed)
        cells = [NAMES[arm.shape], ratios, ends, f"{arm.base_lr:.3g}", f"{arm.warmup:.0%}", f"{arm.seed}"]
        rows.append((key, [*cells, *shown]))
    header = ["model", "ratios", "other", "base LR", "warm-up", "seed", "tune loss", "val loss"]
    return table(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def tables(results: Results) -> dict[str, str]:
    """Return every table of the pages by its name in the templates."""
    every = {
        "gains": gains_table(results),
        "settings": settings_table(results),
        "searched": searched_table(results),
        "experts": experts_table(results),
        "own": own_table(measured()),
        "sharpness": sharpness_table(measured()),
        "runs": runs_table(results),
    }
    return {name: text if text.count("\n") > 1 else "None yet." for name, text in every.items()}


def main() -> None:
    draw_sharpness(measured(), HERE / "sharpness-along-the-run.png")
    write_pages(HERE, tables(load(RESULTS)))


if __name__ == "__main__":
    main()
