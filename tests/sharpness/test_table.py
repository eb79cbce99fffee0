"""The table of a report: its numbers, its order, and what it leaves out."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from blockwise_lr import Block, measure_sharpness
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

LLAMA = ModelConfig("llama", hidden_size=8, layers=2, heads=2, vocab_size=40, context=12)


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    ids = torch.randint(40, (4, 12))
    batches = [{"input_ids": row, "labels": row} for row in ids.split(1)]
    return measure_sharpness(build_model(LLAMA, seed=0), batches, step=1200)


def cells(report):
    """Rows of the table as printed."""
    console = Console(width=200, record=True, file=sys.stderr)
    console.print(report.table())
    rows = [line for line in console.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def with_estimate(report, block, **changes):
    changed = report[block]._replace(**changes)
    return replace(report, blocks={**report.blocks, Block(block): changed})


def test_a_row_is_a_block_flattest_first_with_its_numbers(report):
    rows = cells(report)
    assert [row[0] for row in rows] == sorted((b.value for b in report), key=lambda b: report[b].mean)
    for name, mean, error, relative, elements in rows:
        found = report[name]
        assert float(mean) == pytest.approx(found.mean, rel=1e-3)
        assert float(error.split()[0]) == pytest.approx(found.stderr, rel=0.05)
        assert error.endswith(f"({found.stderr / found.mean:.0%})")
        assert float(relative) == pytest.approx(found.mean / report[Block.NORM].mean, rel=1e-2)
        assert int(elements.replace(",", "")) == found.numel


def test_the_title_says_what_was_measured_on_how_much(report):
    title = "step 1,200, Gauss-Newton trace, labels sampled from the model's softmax, 44 samples in 4 batches"
    assert str(report.table().title) == title
    alone = replace(report, step=None, batches=1, probes=8)
    assert str(alone.table().title) == title.removeprefix("step 1,200, ").replace(
        "4 batches", "1 batch, 8 probes each"
    )


def test_a_negative_mean_has_an_error_but_no_share_and_no_ratio(report):
    row = cells(with_estimate(report, "qk", mean=-2e-5, stderr=1e-5))[0]
    assert row[:4] == ["qk", "-2.000e-05", "1.0e-05", ""]


def test_an_error_above_the_mean_is_not_given_in_per_cent(report):
    noisy = with_estimate(report, "qk", mean=1e-20, stderr=3e-5)
    assert cells(noisy)[0][2] == "3.0e-05 (>100%)"


def test_a_single_draw_has_no_error(report):
    assert cells(with_estimate(report, "qk", mean=1e-20, stderr=math.nan))[0][2] == ""


@pytest.mark.parametrize("norm", [None, -1e-6, 0.0])
def test_without_a_norm_above_zero_nothing_is_relative_to_it(report, norm):
    if norm is None:
        blocks = {block: e for block, e in report.blocks.items() if block is not Block.NORM}
        changed = replace(report, blocks=blocks)
    else:
        changed = with_estimate(report, "norm", mean=norm)
    assert {row[3] for row in cells(changed)} == {""}


def test_without_rich_the_extra_is_named(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ModuleNotFoundError, match=r"tables need rich, .*: pip install '.\[train\]'"):
        report.table()
