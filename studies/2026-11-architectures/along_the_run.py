"""What measure.py found along a uniform run of each model: sharpness, and the ratios of the model's own measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comparison_tables import table

from blockwise_lr import DirectionalReport, SharpnessReport, drawing
from blockwise_lr.blocks import Block
from blockwise_lr.directional.run_ratios import RunRatios
from blockwise_lr.sharpness.estimate import Estimate

SHARPNESS = Path(__file__).parent / "data" / "sharpness"
REFERENCES = {"mamba-2-parts": Block.SSM}
"""The block with ratio 1 in models without FFN."""


@dataclass(frozen=True)
class Measured:
    """What was measured along one run: each block's sharpness by step, and the ratios that follow."""

    shape: str
    sharpness: list[tuple[int, Mapping[Block, Estimate]]]
    ratios: RunRatios

    @property
    def reference(self) -> Block:
        """The block with ratio 1."""
        return REFERENCES.get(self.shape, Block.FFN)

    @property
    def own(self) -> dict[Block, float]:
        """The ratio of each block over that of the reference."""
        return {block: ratio / self.ratios[self.reference] for block, ratio in self.ratios.items()}

    def interval(self, block: Block) -> tuple[float, float]:
        """Return the 95 % interval of a ratio over that of the reference."""
        errors = [self.ratios.stderr[each] / self.ratios[each] for each in (block, self.reference)]
        factor = math.exp(1.96 * math.hypot(*errors)) if block is not self.reference else 1.0
        return self.own[block] / factor, self.own[block] * factor


def measured(folder: Path | None = None) -> dict[str, Measured]:
    """Return what was measured, by model; None: of the study's own folder."""
    found = {}
    for path in sorted((folder or SHARPNESS).glob("*.json")):
        content = json.loads(path.read_text())
        reports = [DirectionalReport.from_dict(each["report"]) for each in content["directional"]]
        sharpness = [
            (each["step"], SharpnessReport.from_dict(each["report"])) for each in content["sharpness"]
        ]
        found[path.stem] = Measured(path.stem, sharpness, DirectionalReport.ratios_of_run(reports))
    return found


def own_table(found: Mapping[str, Measured], names: Mapping[str, str]) -> str:
    """One row a model: its own ratios with their intervals; an asterisk where the measurement does not decide."""
    blocks = [block for block in Block if any(block in each.own for each in found.values())]
    rows = []
    for shape, each in found.items():
        cells = [_own_cell(each, block) if block in each.own else "-" for block in blocks]
        rows.append([names[shape], each.reference.value.upper(), *cells])
    return table(["model", "over", *(block.value.upper() for block in blocks)], rows)


def _own_cell(each: Measured, block: Block) -> str:
    if block is each.reference:
        return "1"
    low, high = each.interval(block)
    asterisk = "*" if block in each.ratios.undetermined else ""
    return f"{each.own[block]:.2g}{asterisk} ({low:.2g} to {high:.2g})"


def sharpness_table(found: Mapping[str, Measured], names: Mapping[str, str]) -> str:
    """One row a model and step: each block's average sharpness with its standard error over batches."""
    blocks = [b for b in Block if any(b in at for each in found.values() for _, at in each.sharpness)]
    rows = []
    for shape, each in found.items():
        for step, at in each.sharpness:
            cells = [f"{at[b].mean:.2g} ± {at[b].stderr:.1g}" if b in at else "-" for b in blocks]
            rows.append([names[shape], str(step), *cells])
    return table(["model", "step", *(block.value.upper() for block in blocks)], rows)


def experts_sharpness_table(found: Mapping[str, Measured], mixture: str, dense: str) -> str:
    """One row a step: the sharpness of FFN over that of VO, with its standard error, in both models."""
    if mixture not in found or dense not in found:
        return ""
    rows = []
    for (step, one), (_, other) in zip(found[mixture].sharpness, found[dense].sharpness):
        rows.append([str(step), *(_over(at[Block.FFN], at[Block.VO]) for at in (one, other))])
    return table(["step", "experts", "dense FFN"], rows)


def _over(one: Estimate, other: Estimate) -> str:
    ratio = one.mean / other.mean
    error = ratio * ((one.stderr / one.mean) ** 2 + (other.stderr / other.mean) ** 2) ** 0.5
    return f"{ratio:.2g} ± {error:.1g}"


def draw_sharpness(found: Mapping[str, Measured], names: Mapping[str, str], path: Path) -> bool:
    """Draw each block's average sharpness along the uniform run, a panel a model; return whether there is any."""
    if not found:
        return False
    with drawing.figure((3.6 * max(2, len(found)), 4.0)) as made:
        panels = made.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (shape, each) in zip(panels, found.items()):
            steps = [step for step, _ in each.sharpness]
            for number, block in enumerate(b for b in Block if b in each.sharpness[0][1]):
                values = [at[block] for _, at in each.sharpness]
                style = drawing.series_style(number) | {"color": drawing.block_colour(block)}
                axes.errorbar(
                    steps,
                    [value.mean for value in values],
                    yerr=[value.stderr for value in values],
                    capsize=2,
                    label=block.value.upper(),
                    **style,
                )
            axes.set_title(names[shape])
            axes.set_xlabel("step")
            axes.set_yscale("log")
            axes.legend(fontsize="small", ncols=2)
        panels[0].set_ylabel("average sharpness tr(H)/#")
        drawing.save(made, path)
    return True
