"""How far from uniform the best ratios are: the power of `measured` that is best at each length of run."""

from __future__ import annotations

import math

from comparison_tables import table, thousands
from gaps import gap, gap_cell
from prediction import FITTED, PREDICTED, UNUSED, exponent, lines, tokens_a_parameter
from tuned import HORIZONS, MODELS, Tuned
from tuning import Results


def exponents_table(results: Results) -> str:
    """The best exponent by model and horizon, and for the larger model what the smaller one's line predicts."""
    keys = [(shape, steps) for shape in MODELS for steps in HORIZONS]
    every = {key: found for key in keys if (found := exponent(*key, results)) is not None}
    found = lines(every)
    rows = []
    for key, values in every.items():
        tokens = tokens_a_parameter(*key)
        cells = ["-", "-"]
        if found is not None and key not in FITTED:
            cells = [f"{start + slope * math.log10(tokens):+.2f}" for start, slope in found]
        row = [MODELS[key[0]], thousands(key[1]), f"{tokens:.2g}", f"{values[0]:.2f}", cells[0]]
        rows.append([*row, f"{values[1]:+.3f}", cells[1]])
    header = ["model", "steps", "tokens a parameter", "best exponent", "predicted", "nats won", "predicted"]
    return table(header, rows)


def prediction_table(found: dict[tuple[str, int, str], Tuned]) -> str:
    """What the predicted ratios win over tuned uniform where no run was fitted, beside `half` and `measured`."""
    uniform = found.get((*UNUSED, "uniform"))
    rows = []
    for rule in (PREDICTED, "half", "measured"):
        if uniform is not None and (each := found.get((*UNUSED, rule))):
            won = gap_cell(gap(uniform.losses, each.losses), len(each.losses))
            ratios = ", ".join(f"{block.upper()} {ratio:.3g}" for block, ratio in each.arm.ratios.items())
            rows.append([rule, ratios, f"{each.arm.base_lr:.2g}", won])
    return table(["ratios", "by block", "base LR", "nats won over uniform"], rows)
