"""SharpnessReport: blocks, layers and parameters agree; the error bars' formula; JSON there and back."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwise_lr import Block, SharpnessReport, measure_sharpness
from blockwise_lr.sharpness import Estimate
from blockwise_lr.sharpness.parameter_parts import OUTSIDE, Part
from blockwise_lr.sharpness.report import FORMAT
from sharpness.references import gpt2, llama, tokens

blocks_of = st.sampled_from([Block.EMB, Block.QK, Block.VO, Block.FFN, Block.NORM])
layers_of = st.sampled_from(["h.0", "h.1", "h.2", OUTSIDE])


@st.composite
def measurements(draw):
    """Parts of any sizes, and what any number of batches and probes found."""
    kinds = draw(st.lists(st.tuples(blocks_of, layers_of, st.integers(1, 10_000)), min_size=1, max_size=12))
    parts = [Part(f"{layer}.{i}", block, layer, numel) for i, (block, layer, numel) in enumerate(kinds)]
    batches, probes = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    samples = draw(st.lists(st.integers(1, 1000), min_size=batches, max_size=batches))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    traces = [
        torch.randn(probes, len(parts), dtype=torch.float64, generator=generator).exp() for _ in samples
    ]
    return parts, traces, samples


def report_of(parts, traces, samples, **options):
    settings = {"estimator": "fisher", "method": "", "seed": 0, "step": None, "histograms": None}
    return SharpnessReport.from_draws(parts, traces, samples, **{**settings, **options})


@settings(max_examples=150, deadline=None)
@given(measurements())
def test_blocks_are_the_means_of_their_parameters_weighted_by_size(measurement):
    parts, *_ = measurement
    report = report_of(*measurement)
    assert sum(estimate.numel for estimate in report.values()) == sum(part.numel for part in parts)
    for block, estimate in report.items():
        inside = [report.per_parameter[part.name] for part in parts if part.block is block]
        assert estimate.numel == sum(one.numel for one in inside)
        assert estimate.mean * estimate.numel == pytest.approx(sum(one.mean * one.numel for one in inside))
        layers = [found[block] for found in report.per_layer.values() if block in found]
        assert estimate.numel == sum(one.numel for one in layers)
        assert estimate.mean * estimate.numel == pytest.approx(sum(one.mean * one.numel for one in layers))
    assert list(report) == sorted(report, key=list(Block).index)
    assert set(report.per_layer) == {part.layer for part in parts}
    if OUTSIDE in report.per_layer:
        assert list(report.per_layer)[-1] == OUTSIDE


@settings(max_examples=150, deadline=None)
@given(measurements())
def test_means_and_errors_are_those_of_the_draws_and_weights_that_the_report_holds(measurement):
    _, traces, samples = measurement
    report = report_of(*measurement)
    assert sum(report.weights) == pytest.approx(1)
    assert report.samples == sum(samples)
    assert (report.batches, report.probes) == (len(traces), len(traces[0]))
    over = {(True, True): "batches", (True, False): "batches", (False, True): "probes", (False, False): None}
    assert report.stderr_over == over[len(traces) > 1, len(traces[0]) > 1]
    for block, estimate in report.items():
        draws, weights = np.array(report.draws[block]), np.array(report.weights)
        assert estimate.mean == pytest.approx(weights @ draws)
        if len(draws) == 1:
            assert math.isnan(estimate.stderr)
        else:
            n = len(draws)
            variance = n / (n - 1) * np.sum(weights**2 * (draws - weights @ draws) ** 2)
            assert estimate.stderr == pytest.approx(variance**0.5)
            if len(set(report.weights)) == 1:
                assert estimate.stderr == pytest.approx(draws.std(ddof=1) / n**0.5)


@settings(max_examples=100, deadline=None)
@given(measurements())
def test_what_goes_into_json_comes_out_again(measurement):
    report = report_of(*measurement, step=7)
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert SharpnessReport.from_dict(json.loads(text)).to_dict() == report.to_dict()


def test_a_measured_report_survives_a_file_with_all_its_fields(tmp_path):
    report = measure_sharpness(gpt2(), [tokens(), tokens(seed=1)], step=3, seed=5, histogram=True)
    report.to_json(tmp_path / "sharpness.json")
    again = SharpnessReport.from_json(tmp_path / "sharpness.json")
    for field in fields(SharpnessReport):
        assert getattr(again, field.name) == getattr(report, field.name), field.name
    assert again == report


def test_a_step_and_a_seed_of_numpy_survive_a_file(tmp_path):
    (step,) = np.arange(7, 8)
    measure_sharpness(gpt2(), tokens(), seed=step, step=step).to_json(tmp_path / "s.json")
    found = SharpnessReport.from_json(tmp_path / "s.json")
    assert (found.seed, found.step) == (7, 7)


def test_errors_that_are_not_known_are_null_and_come_back_as_nan(tmp_path):
    report = measure_sharpness(llama(), tokens())
    report.to_json(tmp_path / "one.json")
    content = json.loads((tmp_path / "one.json").read_text())
    assert all(estimate[1] is None for estimate in content["blocks"].values())
    assert content["stderr_over"] is None
    again = SharpnessReport.from_json(tmp_path / "one.json")
    assert all(math.isnan(estimate.stderr) for estimate in again.values())
    assert {block: estimate.mean for block, estimate in again.items()} == {
        block: estimate.mean for block, estimate in report.items()
    }


def test_numbers_that_are_not_finite_become_null():
    part = Part("w", Block.FFN, OUTSIDE, 1)
    report = report_of([part], [torch.tensor([[math.inf]], dtype=torch.float64)], [1])
    content = report.to_dict()
    assert content["blocks"]["ffn"] == [None, None, 1]
    assert content["draws"]["ffn"] == [None]
    assert math.isnan(SharpnessReport.from_dict(content)[Block.FFN].mean)


def test_blocks_are_found_by_name_too():
    report = measure_sharpness(gpt2(), tokens())
    assert report["qk"] is report[Block.QK]
    assert isinstance(report["qk"], Estimate)
    assert "qk" in report
    assert Block.QK in report
    assert "head" not in report
    assert report.get("head") is None
    assert len(report) == len(list(report)) == 6


@pytest.mark.parametrize("block", ["head", Block.HEAD, "heads", 3])
def test_a_block_that_is_not_there_is_answered_with_those_that_are(block):
    report = measure_sharpness(gpt2(), tokens())
    with pytest.raises(KeyError, match=r"no block .* in this report; it has emb, qk, vo, ffn, norm, pos"):
        report[block]


WRONG = {
    "no JSON": ("{", "Expecting property name"),
    "no text": (b"\xff\xfe\x00", "codec can't decode"),
    "a list": ("[]", "not a sharpness report: its format is list; expected 1"),
    "another file": ("{}", "not a sharpness report: its format is None; expected 1"),
    "a later format": ('{"format": 2}', "not a sharpness report: its format is 2; expected 1"),
    "nothing in it": ('{"format": 1}', "not a sharpness report, or a damaged one: KeyError"),
    "a list of blocks": (
        '{"format": 1, "blocks": []}',
        "not a sharpness report, or a damaged one: AttributeError",
    ),
    "an unknown block": (
        '{"format": 1, "blocks": {"brain": [1, 2, 3]}}',
        "not a sharpness report, or a damaged one: ValueError.*brain",
    ),
    "too few numbers": (
        '{"format": 1, "blocks": {"qk": [1, 2]}}',
        "or a damaged one: ValueError.*not enough values",
    ),
    "no numbers": ('{"format": 1, "blocks": {"qk": 3}}', "or a damaged one: TypeError"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_file_that_holds_no_report_is_refused_with_its_path(tmp_path, content, message):
    path = tmp_path / "wrong.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"wrong.json: .*{message}"):
        SharpnessReport.from_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.json"):
        SharpnessReport.from_json(tmp_path / "missing.json")


def test_a_report_says_which_format_it_has():
    assert measure_sharpness(gpt2(), tokens()).to_dict()["format"] == FORMAT == 1
