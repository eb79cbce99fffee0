"""The two loops over every element, written for speed, against their literal counterparts in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from blockwise_lr import Block, classify
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.predictions import IGNORED, Predictions, sampled_labels

ALMOST_ONE = 1 - 2.0**-53


def predictions(logits, counted=None):
    everything = torch.ones(len(logits), dtype=torch.bool)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    return Predictions(logits, labels, everything if counted is None else counted)


def inverse_distribution_function(logits, uniforms):
    """The first class at which the softmax's distribution function passes u."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return (cumulative > torch.from_numpy(uniforms).unsqueeze(1) * cumulative[:, -1:]).int().argmax(-1)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 63, 64, 65, 1000, 50_257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_labels_are_those_of_the_inverse_distribution_function(kind, classes, scale):
    rows = 64
    generator = torch.Generator().manual_seed(classes)
    logits = (scale * torch.randn(rows, classes, generator=generator) - 30).to(kind)
    uniforms = np.random.default_rng(classes).random(rows)
    assert sampled_labels(predictions(logits), uniforms).equal(
        inverse_distribution_function(logits, uniforms)
    )


def test_labels_do_not_depend_on_how_many_rows_there_are_at_a_time(monkeypatch):
    logits, uniforms = torch.randn(100, 77), np.random.default_rng(0).random(100)
    whole = sampled_labels(predictions(logits), uniforms)
    monkeypatch.setattr("blockwise_lr.sharpness.sampling._CHUNK", 3 * 77)
    assert sampled_labels(predictions(logits), uniforms).equal(whole)


@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("u", [0.0, 1e-300, 0.25, 0.5, 0.75, ALMOST_ONE])
def test_a_class_that_cannot_be_is_never_drawn(classes, u):
    logits = torch.full((classes, classes), -torch.inf)
    logits.fill_diagonal_(3.0)  # row i allows class i only
    logits[0, -1] = 3.0
    labels = sampled_labels(predictions(logits), np.full(classes, u))
    assert labels[1:].tolist() == list(range(1, classes))
    assert labels[0] == (0 if u < 0.5 else classes - 1)


def test_rows_that_do_not_count_may_hold_anything():
    logits = torch.zeros(4, 30)
    logits[1], logits[2] = torch.nan, torch.inf
    counted = torch.tensor([True, False, False, True])
    labels = sampled_labels(predictions(logits, counted), np.full(2, 0.5))
    assert labels.tolist() == [15, IGNORED, IGNORED, 15]


@pytest.mark.parametrize("shape", [(3,), (256,), (5, 1000), (1500, 800)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["as it is", "transposed", "every other column"])
def test_squares_and_products_are_those_of_float64(shape, kind, layout):
    generator = torch.Generator().manual_seed(0)
    wide = (*shape[:-1], 2 * shape[-1])
    first, second = (
        torch.randn(wide, generator=generator).to(kind)[..., ::2]
        if layout == "every other column"
        else torch.randn(shape, generator=generator).to(kind)
        for _ in range(2)
    )
    if layout == "transposed":
        first, second = (t.movedim(0, -1) for t in (first, second))
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.empty(first.shape)))
    parts = ParameterParts(module, classify(module, overrides={".": Block.OTHER}), distributed=False)
    exact = 1e-12 if kind is torch.float64 or first.numel() < 1 << 16 else 1e-7
    assert parts.sums([first]).item() == pytest.approx(first.double().square().sum().item(), rel=exact)
    product = (first.double() * second.double()).sum().item()
    assert parts.sums([first], [second]).item() == pytest.approx(product, rel=1e-12)
