"""The page on initial scales: its tables follow from the rates and scales of others, and give them back."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from blockwise_lr import MEASURED_RATIOS, Block, param_groups
from blockwise_lr.optim.initial_scales import scale_factor
from support import tiny_models

TEXT = (Path(__file__).parents[2] / "docs/how-to/initial-scale.md").read_text(encoding="utf-8")
WIDTH = 768


def rows(first):
    """The rows of the table whose first column has this heading."""
    table = re.search(rf"^\| {first} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", TEXT, flags=re.MULTILINE)[1]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]


def rates_and_scales(name):
    found = {
        Block(block.lower()): (float(lr), float(scale))
        for own, block, lr, scale in rows("set-up")
        if own == name
    }
    scales = {block: scale for block, (_, scale) in found.items() if scale > 0}
    return {block: lr for block, (lr, _) in found.items()}, scales


BLOCKS = (Block.EMB, Block.QK, Block.FFN, Block.VO, Block.NORM, Block.HEAD)
RATIOS = {name: dict(zip(BLOCKS, cells)) for name, *cells in rows("ratios")}


@pytest.mark.parametrize("name", ["modded-nanogpt", "nanochat"])
def test_the_ratios_follow_from_the_rates_and_the_scales(name):
    rates, scales = rates_and_scales(name)
    for block, shown in RATIOS[name].items():
        if block not in scales:
            assert shown == ("not defined" if block in rates else "none")
        else:
            ratio = rates[block] / rates[Block.FFN] / scale_factor(block, scales)
            assert float(shown) == pytest.approx(ratio, rel=5e-3)


@pytest.mark.parametrize("name", ["modded-nanogpt", "nanochat"])
def test_the_ratios_give_the_rates_back(name):
    rates, scales = rates_and_scales(name)
    ratios = {block: float(shown) for block, shown in RATIOS[name].items() if block in scales}
    # A block without a scale of its own gets one, as the page says.
    groups = param_groups(
        tiny_models.llama(), rates[Block.FFN], ratios, relative_to={"head": 0.02, "norm": 1.0, **scales}
    )
    for group in groups:
        if group["block"] in ratios:
            assert group["lr"] == pytest.approx(rates[group["block"]], rel=0.01)


def test_measured_is_what_the_library_has():
    assert {block: float(shown) for block, shown in RATIOS["measured"].items()} == MEASURED_RATIOS


def test_nanochats_matrices_move_by_muons_update():
    """Muon's update of d x d has d singular values of 1; of 4d x d it is as large after its scaling by sqrt(4)."""
    rates, scales = rates_and_scales("nanochat")
    square = 0.02 * math.sqrt(WIDTH / WIDTH**2)
    tall = 0.02 * math.sqrt(4) * math.sqrt(WIDTH / (4 * WIDTH**2))
    assert square == pytest.approx(tall)
    assert rates[Block.QK] == rates[Block.VO] == rates[Block.FFN] == pytest.approx(square, rel=1e-3)
    assert scales[Block.QK] == scales[Block.VO] == pytest.approx(1 / math.sqrt(WIDTH), rel=1e-2)
    assert scales[Block.FFN] == pytest.approx(0.4 / math.sqrt(WIDTH), rel=1e-2)
