"""ratios_from_sharpness: the paper's logic, its uncertainty, and where a report may stand for ratios."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockwise_lr import Block, SharpnessReport, measure_sharpness, param_groups, ratios_from_sharpness
from blockwise_lr.optim import resolve_ratios
from blockwise_lr.sharpness.parameter_parts import Part
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.ratio_text import parse_ratios

AT_40_000_STEPS = {
    Block.EMB: 8.5e-7,
    Block.QK: 1.5e-6,
    Block.FFN: 2.9e-6,
    Block.VO: 5.5e-6,
    Block.NORM: 3.1e-5,
}


def report_of(draws: dict[Block, list[float]]) -> SharpnessReport:
    """A report of as many batches of 100 samples as there are draws of S(b); every block has 10 elements."""
    parts = [Part(block.value, block, "outside", 10) for block in draws]
    traces = [torch.tensor([[10 * value for value in batch]]).double() for batch in zip(*draws.values())]
    return SharpnessReport.from_draws(
        parts, traces, [100] * len(traces),
        estimator="fisher", method="", seed=0, step=None, histograms=None,
    )  # fmt: skip


def test_the_papers_figure_gives_nearly_the_papers_ratios() -> None:
    ratios = ratios_from_sharpness(AT_40_000_STEPS)
    expected = {Block.EMB: 11.0, Block.QK: 7.53, Block.FFN: 4.85, Block.VO: 3.17, Block.NORM: 1.0}
    assert dict(ratios) == pytest.approx(expected, rel=2e-3)
    assert ratios.clipped == ()


@given(
    st.dictionaries(st.sampled_from([b for b in Block if b is not Block.NORM]), st.floats(1e-9, 1e-3)),
    st.floats(0.1, 2),
)
def test_flatter_blocks_learn_faster_within_the_bounds(values: dict[Block, float], power: float) -> None:
    ratios = ratios_from_sharpness({**values, Block.NORM: 1e-5}, power, low=0.5, high=4)
    assert all(0.5 <= ratio <= 4 for ratio in ratios.values())
    for a in ratios:
        for b in ratios:
            if ratios.unclipped[a] > ratios.unclipped[b]:
                assert ratios[a] >= ratios[b]
                assert {**values, Block.NORM: 1e-5}[a] <= {**values, Block.NORM: 1e-5}[b]


def test_a_power_of_zero_is_a_uniform_learning_rate() -> None:
    assert set(ratios_from_sharpness(AT_40_000_STEPS, power=0).values()) == {1.0}


def test_another_reference_and_bounds_below_one() -> None:
    ratios = ratios_from_sharpness(AT_40_000_STEPS, power=1, reference=Block.VO, low=0.01)
    assert ratios[Block.VO] == 1
    assert ratios[Block.NORM] == pytest.approx(5.5 / 31)


def test_clipped_blocks_are_named() -> None:
    ratios = ratios_from_sharpness(AT_40_000_STEPS, high=5)
    assert ratios.clipped == (Block.EMB, Block.QK)
    assert ratios[Block.EMB] == 5
    assert ratios.unclipped[Block.EMB] > 10


def test_the_standard_error_covers_the_truth_as_often_as_it_should() -> None:
    rng, truth, inside, trials, batches = np.random.default_rng(0), 10 ** (2 / 3), 0, 400, 12
    for _ in range(trials):
        common = rng.gamma(8, 1 / 8, batches)  # a batch that is sharp is sharp in every block
        draws = {
            Block.NORM: list(10 * common * rng.gamma(30, 1 / 30, batches)),
            Block.QK: list(common * rng.gamma(60, 1 / 60, batches)),
        }
        ratios = ratios_from_sharpness(report_of(draws))
        inside += abs(ratios[Block.QK] - truth) < 2.201 * ratios.stderr[Block.QK]  # t of 11 degrees, 95 %
    # 380 expected; a binomial's standard deviation is 4.4, the linearised error costs a little.
    assert 360 <= inside <= 397


def test_what_all_blocks_share_cancels_in_the_error_of_a_ratio() -> None:
    common = [1.0, 2.0, 0.5, 1.5]
    ratios = ratios_from_sharpness(report_of({Block.NORM: [10 * c for c in common], Block.QK: common}))
    assert ratios.stderr[Block.QK] == pytest.approx(0, abs=1e-12)
    assert ratios.stderr[Block.NORM] == 0


def test_a_single_draw_has_no_standard_error() -> None:
    ratios = ratios_from_sharpness(report_of({Block.NORM: [1e-5], Block.QK: [1e-6]}))
    assert math.isnan(ratios.stderr[Block.QK])
    assert math.isnan(ratios_from_sharpness(AT_40_000_STEPS).stderr[Block.QK])


def test_a_report_measured_on_a_model_sets_its_groups() -> None:
    model = build_model(ModelConfig(hidden_size=8, layers=1, heads=2, vocab_size=17, context=16), seed=0)
    ids = torch.arange(24).reshape(2, 12) % 17
    report = measure_sharpness(model, [{"input_ids": ids, "labels": ids}] * 2)
    ratios = ratios_from_sharpness(report)
    groups = param_groups(model, lr=1e-3, ratios=report)
    assert {g["block"]: g["lr_ratio"] for g in groups} == {b.value: r for b, r in ratios.items()}
    assert resolve_ratios(report)[Block.QK] == ratios[Block.QK]


def test_a_file_of_a_report_is_ratios_on_the_command_line(tmp_path: Path) -> None:
    report = report_of({Block.NORM: [1e-5, 1.2e-5], Block.QK: [1e-6, 2e-6]})
    report.to_json(tmp_path / "sharpness.json")
    assert parse_ratios(str(tmp_path / "sharpness.json")) == dict(ratios_from_sharpness(report))


def test_a_damaged_report_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "sharpness.json"
    path.write_text('{"estimator": "fisher", "format": 99}')
    with pytest.raises(
        ValueError, match="sharpness.json: not a sharpness report: its format is 99; expected 1"
    ):
        parse_ratios(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power": math.nan}, "power is nan; expected a finite number"),
        ({"low": 2.0, "high": 1.0}, "low is 2.0 and high 1.0; expected 0 < low <= high"),
        ({"low": 0.0}, "low is 0.0 and high 20.0; expected 0 < low <= high"),
        ({"reference": Block.HEAD}, "no block head, to which the others are compared; it has emb, qk, ffn, vo, norm"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratios_from_sharpness(AT_40_000_STEPS, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1e-6, math.inf])
def test_a_sharpness_that_is_not_above_zero_is_refused(value: float) -> None:
    with pytest.raises(
        ValueError, match=r"the sharpness of qk is .*; expected a finite number above 0: measure more"
    ):
        ratios_from_sharpness({**AT_40_000_STEPS, Block.QK: value})
