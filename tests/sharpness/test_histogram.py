"""Elements by their sharpness: every element counted once, and where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from blockwise_lr import Block, classify, measure_sharpness
from blockwise_lr.sharpness.estimators import Draws
from blockwise_lr.sharpness.histogram import HIGHEST, LOWEST, WIDTH, Histograms
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from sharpness.references import gpt2, llama, tokens


def counted(values, samples=1):
    """The histogram of a weight whose elements have these sharpnesses."""
    model = nn.Linear(len(values), 1, bias=False)
    parts = ParameterParts(model, classify(model, {".": Block.FFN}), distributed=False)
    histograms = Histograms(parts)
    gradient = (torch.tensor([values], dtype=torch.float64) * samples).sqrt().float()  # B g^2 = (B g)^2 / B
    histograms.add(Draws(torch.zeros(1, 1), torch.tensor([[samples, 0.0]]), [gradient]))
    return histograms.counts()[Block.FFN]


def edges(histogram):
    return [histogram.start + i * histogram.width for i in range(len(histogram.counts) + 1)]


def test_an_element_is_counted_in_the_bin_of_its_logarithm():
    found = counted([1.1e-3, 1.2e-3, 0.03, 0.0], samples=5)
    assert found.zeros == 1
    assert sum(found.counts) == 3
    assert found.counts[0] == 2
    assert found.start == pytest.approx(-3.0)
    assert found.counts[-1] == 1
    assert edges(found)[-2] <= np.log10(0.03) < edges(found)[-1]
    assert found.width == WIDTH


def test_what_is_beyond_the_scale_is_counted_at_its_ends():
    found = counted([1e-30, 1e12])
    assert found.zeros == 1
    assert found.counts == [1]
    assert edges(found)[-1] == pytest.approx(HIGHEST)
    assert found.start > LOWEST


def test_a_block_without_gradient_has_zeros_only():
    found = counted([0.0, 0.0, 0.0])
    assert (found.zeros, found.counts) == (3, [])


@pytest.mark.parametrize("estimator", ["fisher", "empirical"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_every_element_is_counted_once(build, estimator):
    batches = [tokens(seed=i) for i in range(3)]
    report = measure_sharpness(build(), batches, estimator=estimator, histogram=True)
    assert set(report.histograms) == set(report)
    for block, histogram in report.histograms.items():
        assert sum(histogram.counts) + histogram.zeros == report[block].numel


def test_rows_of_tokens_that_did_not_occur_are_zeros():
    batch = {"input_ids": torch.tensor([[1, 2, 1, 2]]), "labels": torch.tensor([[1, 2, 1, 2]])}
    histogram = measure_sharpness(llama(), batch, histogram=True).histograms[Block.EMB]
    assert histogram.zeros == (7 - 2) * 8


@pytest.mark.parametrize("estimator", ["fisher", "empirical"])
def test_the_histograms_mean_is_the_blocks_sharpness(estimator):
    # Bins are a tenth of a decade wide: what they say of the mean is right to half of that.
    batches = [tokens(rows=1, length=3), tokens(rows=2, length=6, seed=1)]
    report = measure_sharpness(gpt2(), batches, estimator=estimator, histogram=True)
    for block, histogram in report.histograms.items():
        middles = 10 ** (np.array(edges(histogram)[:-1]) + histogram.width / 2)
        mean = float(middles @ np.array(histogram.counts)) / report[block].numel
        assert mean == pytest.approx(report[block].mean, rel=0.1)


def test_there_are_none_unless_asked_for():
    assert measure_sharpness(gpt2(), tokens()).histograms == {}
