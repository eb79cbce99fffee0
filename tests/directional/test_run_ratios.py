"""ratios_from_sharpness of several DirectionalReports: the mean along a run, over FFN's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from blockwise_lr import Block, DirectionalReport, ratios_from_sharpness
from blockwise_lr.directional.slope import Slope
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.ratio_text import parse_ratios


def report(step: int = 1, lr: float = 1.0, **factors: float) -> DirectionalReport:
    """A report in which each block could take `factor` times its learning rate; below 0: it overshoots."""
    slopes = {
        Block(name): Slope(
            lr, f * lr, 0.1, 1.0, 0.1, f * lr, 0.1, 0.0, 10 if name == "vo" else 5, 1.0, f * lr, 0.1
        )
        for name, f in factors.items()
    }
    apart = [[float(a == b) for a in slopes] for b in slopes]
    return DirectionalReport(slopes, apart, None, samples=8, batches=2, step=step)


def test_ratios_are_geometric_means_over_ffns() -> None:
    along = [report(ffn=2.0, emb=8.0, vo=1.0), report(ffn=0.5, emb=8.0, vo=1.0)]
    ratios = ratios_from_sharpness(along)
    assert dict(ratios) == pytest.approx({Block.EMB: 8.0, Block.VO: 1.0, Block.FFN: 1.0})
    # log(8 / 2) and log(8 / 0.5) lie log(2) to either side of their mean, log(8).
    error = math.log(2) * math.sqrt(2) / math.sqrt(2)
    assert ratios.stderr[Block.EMB] == pytest.approx(8.0 * error)
    assert ratios.stderr[Block.FFN] == 0.0


def test_one_that_overshoots_counts_as_the_lower_bound_and_none_counts_beyond_the_upper() -> None:
    along = [report(ffn=1.0, vo=-5.0, norm=1e4, qk=0.01)] * 2
    assert dict(ratios_from_sharpness(along)) == pytest.approx(
        {Block.FFN: 1.0, Block.VO: 0.1, Block.NORM: 20.0, Block.QK: 0.1}
    )
    wider = ratios_from_sharpness(along, low=0.05, high=1e3)
    assert wider[Block.NORM] == pytest.approx(1e3)
    assert wider[Block.VO] == pytest.approx(0.05)


def test_all_blocks_together_count_and_not_each_alone() -> None:
    """C = [[1, 1/2], [1/2, 1]] and s = (1, 1/2): EMB alone could take 1/2, beside FFN nothing; FFN 1."""
    alone = report(ffn=1.0, emb=0.5)
    coupled = [replace(alone, matrix=[[1.0, 0.5], [0.5, 1.0]])] * 2
    assert alone[Block.EMB].best_lr == 0.5
    assert coupled[0].joint_best_lr == pytest.approx({Block.FFN: 1.0, Block.EMB: 0.0}, abs=1e-12)
    assert ratios_from_sharpness(coupled)[Block.EMB] == pytest.approx(0.1)


def test_the_ratios_at_which_a_run_was_measured_count() -> None:
    at_ratio_4 = [
        replace(each, blocks={b: s._replace(ratio=4.0 if b is Block.EMB else 1.0) for b, s in each.items()})
        for each in [report(ffn=1.0, emb=2.0)] * 2
    ]
    assert ratios_from_sharpness(at_ratio_4)[Block.EMB] == pytest.approx(8.0)


def test_reports_at_learning_rate_0_are_left_out_and_blocks_may_come_later() -> None:
    along = [report(lr=0.0, ffn=9.0, emb=9.0), report(ffn=1.0), report(ffn=1.0, emb=3.0)]
    ratios = ratios_from_sharpness(along)
    assert dict(ratios) == pytest.approx({Block.FFN: 1.0, Block.EMB: 3.0})
    assert math.isnan(ratios.stderr[Block.EMB])


def test_without_ffn_the_largest_block_is_the_anchor() -> None:
    ratios = ratios_from_sharpness([report(vo=2.0, emb=6.0)] * 2)
    assert dict(ratios) == pytest.approx({Block.VO: 1.0, Block.EMB: 3.0})


def test_a_directional_json_of_a_run_stands_for_all_of_its_reports(tmp_path: Path) -> None:
    along = [report(step=1, ffn=1.0, emb=2.0), report(step=2, ffn=1.0, emb=8.0)]
    path = tmp_path / "directional.json"
    path.write_text(json.dumps({**along[1].to_dict(), "earlier": [along[0].to_dict()]}))
    assert parse_ratios(str(path))[Block.EMB] == pytest.approx(4.0)
    assert resolve_ratios(along)[Block.EMB] == pytest.approx(4.0)
    # A single moment says what it says: of the block's own learning rate, whatever FFN's is.
    path.write_text(json.dumps(along[1].to_dict()))
    assert parse_ratios(str(path))[Block.EMB] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "all 0 reports were measured at learning rate 0"),
        ([report(lr=0.0, ffn=1.0)] * 3, "all 3 reports were measured at learning rate 0.*measure between"),
        ([report(ffn=1.0), {"emb": 4}], r"expected DirectionalReports, got \{'emb': 4\} among 2"),
        ("paper", "expected DirectionalReports, got 'p' among 5"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratios_from_sharpness(given)  # type: ignore[arg-type]
