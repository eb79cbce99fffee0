"""Ratios of several DirectionalReports: a bounded minimum at each report, and a mean drawn towards `measured`."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwise_lr import Block, DirectionalReport, ratios_from_sharpness
from blockwise_lr.directional.bounded_rates import bounded_minimum, log_errors
from blockwise_lr.directional.ratio_display import ratio_lines
from blockwise_lr.directional.run_ratios import PRIOR_SPREAD, REPORT_SCATTER
from blockwise_lr.directional.slope import Slope
from blockwise_lr.optim.ratios import MEASURED_RATIOS, resolve_ratios
from blockwise_lr.train.ratio_text import parse_ratios

OCTAVE = math.log(2)


def report(step: int = 1, lr: float = 1.0, error: float = 0.0, **factors: float) -> DirectionalReport:
    """A report whose blocks do not interact; the damped minimum is at `factor` times the learning rate.

    With curvature 1 and a damping of 1, a signal of 2 f has its minimum at f.
    """
    slopes = {
        Block(name): Slope(
            lr, 2 * f * lr, error, 1.0, 0.1, 2 * f * lr, 0.1, 0.0, 10 if name == "vo" else 5, 1.0, f * lr, 0.1
        )
        for name, f in factors.items()
    }
    apart = [[float(a == b) for a in slopes] for b in slopes]
    return DirectionalReport(slopes, apart, None, samples=8, batches=2, step=step)


def weight(error: float) -> float:
    return PRIOR_SPREAD**2 / (PRIOR_SPREAD**2 + error**2)


def literal_minimum(matrix: np.ndarray, signal: np.ndarray, low: float, high: float) -> np.ndarray:
    """The best of all points at which some entries are at a bound and the others have no slope."""
    best, found = math.inf, signal
    for places in itertools.product((low, high, None), repeat=len(signal)):
        point = np.array([math.nan if place is None else place for place in places])
        free = np.isnan(point)
        point[~free] = [place for place in places if place is not None]
        rest = signal[free] - matrix[np.ix_(free, ~free)] @ point[~free]
        point[free] = np.linalg.solve(matrix[np.ix_(free, free)], rest)
        value = point @ matrix @ point / 2 - signal @ point
        if (point >= low - 1e-12).all() and (point <= high + 1e-12).all() and value < best:
            best, found = value, point
    return found


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_bounded_minimum_is_the_best_of_all_choices_of_bounds(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(size, size + 1))
    matrix = factor @ factor.T + np.diag(rng.uniform(0.1, 1, size))
    signal = 3 * rng.normal(size=size)
    found = bounded_minimum(matrix, signal, 0.1, 2.0)
    assert found == pytest.approx(literal_minimum(matrix, signal, 0.1, 2.0), abs=1e-8)


def test_within_the_bounds_the_minimum_is_the_solution_and_moves_with_the_signal() -> None:
    matrix, signal = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([3.0, 2.0])
    found = bounded_minimum(matrix, signal, 0.1, 20.0)
    assert matrix @ found == pytest.approx(signal)
    step = 1e-6
    moved = bounded_minimum(matrix, signal + np.array([step, 0]), 0.1, 20.0)
    assert log_errors(matrix, found, [1.0, 0.0], 0.1, 20.0)[:, 0] == pytest.approx(
        np.log(moved / found) / step, rel=1e-4
    )
    at_the_bound = bounded_minimum(matrix, np.array([-3.0, 2.0]), 0.1, 20.0)
    assert at_the_bound[0] == 0.1
    assert log_errors(matrix, at_the_bound, [1.0, 0.0], 0.1, 20.0) == pytest.approx(np.zeros((2, 2)))


@pytest.mark.parametrize(("matrix", "signal"), [([[0.0]], [1.0]), ([[1.0]], [math.nan])])
def test_a_model_without_a_minimum_is_refused(matrix: list[list[float]], signal: list[float]) -> None:
    with pytest.raises(ValueError, match="curvature that is not above 0.*measure more batches"):
        bounded_minimum(matrix, signal, 0.1, 20.0)


def test_ratios_are_drawn_towards_measured_by_their_standard_error() -> None:
    """EMB's log ratios lie an octave to either side of log 8, so their scatter is sqrt(16 / 15) octaves."""
    ratios = ratios_from_sharpness([report(ffn=2.0, emb=8.0), report(ffn=0.5, emb=8.0)] * 8)
    error = max(OCTAVE * math.sqrt(16 / 15) * 2 / 2, REPORT_SCATTER) / 4
    assert ratios.alone[Block.EMB] == pytest.approx(8.0)
    assert ratios.log_error[Block.EMB] == pytest.approx(error)
    w = weight(error)
    assert ratios[Block.EMB] == pytest.approx(8.0**w * MEASURED_RATIOS[Block.EMB] ** (1 - w))
    assert ratios.stderr[Block.EMB] == pytest.approx(ratios[Block.EMB] * math.sqrt(w) * error)
    assert (ratios[Block.FFN], ratios.stderr[Block.FFN]) == (1.0, 0.0)
    assert (ratios.undetermined, ratios.clipped) == ({}, ())


def test_many_reports_that_agree_leave_little_of_the_prior() -> None:
    ratios = ratios_from_sharpness([report(ffn=1.0, emb=2.0, norm=3.0)] * 400)
    assert ratios[Block.EMB] == pytest.approx(2.0, rel=2e-2)
    assert ratios[Block.NORM] == pytest.approx(3.0, rel=2e-2)


@given(st.integers(1, 30), st.floats(0.2, 10), st.floats(0.2, 10))
@settings(max_examples=40, deadline=None)
def test_a_ratio_lies_between_the_measurement_and_measured(count: int, emb: float, vo: float) -> None:
    ratios = ratios_from_sharpness([report(ffn=1.0, emb=emb, vo=vo)] * count)
    for block in ratios:
        low, high = sorted((ratios.alone[block], ratios.prior[block]))
        assert low * (1 - 1e-9) <= ratios[block] <= high * (1 + 1e-9)
        assert (block in ratios.undetermined) == (count < 3 and block is not Block.FFN)


def test_one_that_overshoots_counts_as_the_lower_bound_and_none_counts_beyond_the_upper() -> None:
    along = [report(ffn=1.0, vo=-5.0, norm=1e4, qk=0.01)] * 2
    alone = {Block.FFN: 1.0, Block.VO: 0.1, Block.NORM: 20.0, Block.QK: 0.1}
    assert dict(ratios_from_sharpness(along).alone) == pytest.approx(alone)
    wider = ratios_from_sharpness(along, low=0.05, high=1e3).alone
    assert wider[Block.NORM] == pytest.approx(1e3)
    assert wider[Block.VO] == pytest.approx(0.05)


def test_all_blocks_together_count_and_not_each_alone() -> None:
    """C = [[1, 1], [1, 1]] and s = (2, 2): alone each could take 1, and with the damping both take 2/3."""
    alone = report(ffn=1.0, emb=1.0)
    coupled = [replace(alone, matrix=[[1.0, 1.0], [1.0, 1.0]])] * 3
    assert ratios_from_sharpness(coupled).alone[Block.EMB] == pytest.approx(1.0)
    steeper = {**alone.blocks, Block.EMB: alone[Block.EMB]._replace(signal=1.0)}
    # 2 f + e = 2 and f + 2 e = 1: f is 1 and e would be 0, so e is at its bound.
    ratios = ratios_from_sharpness([replace(each, blocks=steeper) for each in coupled])
    assert ratios.alone[Block.EMB] == pytest.approx(0.1 / 0.95)


def test_the_ratios_at_which_a_run_was_measured_count() -> None:
    at_ratio_4 = [
        replace(each, blocks={b: s._replace(ratio=4.0 if b is Block.EMB else 1.0) for b, s in each.items()})
        for each in [report(ffn=1.0, emb=2.0)] * 2
    ]
    assert ratios_from_sharpness(at_ratio_4).alone[Block.EMB] == pytest.approx(8.0)


def test_few_reports_determine_nothing_and_say_so() -> None:
    """Two late checkpoints that agree on 200 are two moments of the run."""
    late = [report(ffn=0.1, emb=20.0, norm=20.0)] * 2
    ratios = ratios_from_sharpness(late)
    assert ratios.alone[Block.EMB] == pytest.approx(200)
    assert dict(ratios) == {Block.EMB: 16.0, Block.FFN: 1.0, Block.NORM: 32.0}
    assert ratios.notes() == [
        f"{name}: not determined by this measurement (2 reports, uncertain by a factor of 2.2; "
        f"measure more checkpoints), using measured's {prior}"
        for name, prior in (("EMB", 16), ("NORM", 32))
    ]
    assert ratio_lines(late)[-1] == "no block is determined by this measurement: use --ratios measured"
    (alone,) = {*late[0].ratios().undetermined.values()}
    assert alone == "1 report, uncertain by a factor of 3; measure more checkpoints"


def test_noisy_signals_make_a_block_undetermined_and_ask_for_batches() -> None:
    """A signal of 2 with an error of 4 moves the log factor by 2."""
    noisy = [report(ffn=1.0, emb=1.0, vo=1.0)] * 5
    noisy = [
        replace(each, blocks={**each.blocks, Block.EMB: each[Block.EMB]._replace(signal_stderr=4.0)})
        for each in noisy
    ]
    ratios = ratios_from_sharpness(noisy)
    assert ratios.log_error[Block.EMB] == pytest.approx(2 / math.sqrt(5))
    assert ratios.undetermined == {
        Block.EMB: "5 reports, uncertain by a factor of 2.4; measure more batches, --batches"
    }
    assert (ratios[Block.EMB], ratios[Block.VO] < 1) == (16.0, True)
    lines = ratio_lines(noisy)
    assert lines[-1].startswith("--ratios emb=16,vo=0.79")
    assert lines[-1].endswith("(determined here: vo, ffn; emb as in measured)")
    pasted = lines[-1].split()[1]
    assert parse_ratios(pasted) == pytest.approx(dict(ratios), rel=5e-3)


def test_reports_at_learning_rate_0_are_left_out_and_blocks_may_come_later() -> None:
    along = [report(lr=0.0, ffn=9.0, emb=9.0), report(ffn=1.0), report(ffn=1.0, emb=3.0)]
    ratios = ratios_from_sharpness(along)
    assert dict(ratios.alone) == pytest.approx({Block.FFN: 1.0, Block.EMB: 3.0})
    assert ratios.reports == 2
    assert ratios.undetermined[Block.EMB].startswith("1 report,")


def test_a_block_without_curvature_is_not_determined_and_damaged_reports_are_left_out() -> None:
    flat = report(ffn=1.0, emb=2.0, qk=3.0)
    flat = replace(flat, blocks={**flat.blocks, Block.QK: flat[Block.QK]._replace(curvature=0.0)})
    lost = replace(flat, matrix=[[math.nan] * 3] * 3)
    ratios = ratios_from_sharpness([flat, flat, flat, lost])
    assert ratios.reports == 3
    assert ratios.undetermined == {Block.QK: "0 reports; measure more checkpoints"}
    assert ratios[Block.QK] == 4.0
    assert ratios.to_dict()["qk"]["determined"] is False
    json.dumps(ratios.to_dict(), allow_nan=False)
    nothing = ratios_from_sharpness([lost])
    assert (nothing.reports, dict(nothing)) == (0, {b: MEASURED_RATIOS[b] for b in nothing})
    assert ratio_lines([lost])[-1] == "no block is determined by this measurement: use --ratios measured"


def test_without_ffn_the_largest_block_is_the_anchor() -> None:
    ratios = ratios_from_sharpness([report(vo=2.0, emb=6.0)] * 400)
    assert (ratios.anchor, ratios.prior[Block.EMB]) == (Block.VO, 32.0)
    assert dict(ratios) == pytest.approx({Block.VO: 1.0, Block.EMB: 3.0}, rel=2e-2)


def test_a_directional_json_of_a_run_stands_for_all_of_its_reports(tmp_path: Path) -> None:
    along = [report(step=step, ffn=1.0, emb=emb) for step, emb in enumerate((2.0, 8.0) * 10)]
    path = tmp_path / "directional.json"
    earlier = [each.to_dict() for each in along[:-1]]
    path.write_text(json.dumps({**along[-1].to_dict(), "earlier": earlier}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_ratios(str(path)) == dict(ratios_from_sharpness(along))
        assert resolve_ratios(along)[Block.EMB] == ratios_from_sharpness(along)[Block.EMB]
    assert ratios_from_sharpness(along)[Block.EMB] == pytest.approx(4.0, rel=0.3)


def test_the_use_of_ratios_that_are_not_determined_warns(tmp_path: Path) -> None:
    path = tmp_path / "directional.json"
    path.write_text(json.dumps(report(ffn=1.0, emb=2.0).to_dict()))
    message = "does not determine EMB; expected .* used the ratios of .measured.: measure more checkpoints"
    for use in (
        lambda: parse_ratios(str(path)),
        lambda: resolve_ratios(report(ffn=1.0, emb=2.0)),
        lambda: resolve_ratios([report(ffn=1.0, emb=2.0)]),
    ):
        with pytest.warns(UserWarning, match=message):
            assert use()[Block.EMB] == 16.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "all 0 reports were measured at learning rate 0"),
        ([report(lr=0.0, ffn=1.0)] * 3, "all 3 reports were measured at learning rate 0.*measure between"),
        ([report(ffn=1.0), {"emb": 4}], r"expected DirectionalReports, got \{'emb': 4\} among 2"),
        ("paper", "expected DirectionalReports, got 'p' among 5"),
        (report(lr=0.0, ffn=1.0), "all 1 reports were measured at learning rate 0"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratios_from_sharpness(given)  # type: ignore[arg-type]
