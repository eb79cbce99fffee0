"""The two loops over every element, written for speed, against their literal counterparts in float64."""

from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockwise_lr import Block, classify
from blockwise_lr.sharpness import sampling, tensor_sums
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.predictions import IGNORED, Predictions, sampled_labels
from blockwise_lr.sharpness.sampling import SampleNumbers

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


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    classes=st.integers(1, 300),
    at_a_time=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_labels_do_not_depend_on_how_many_rows_there_are_at_a_time(rows, classes, at_a_time, kind, seed):
    logits = (4 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))).to(kind)
    uniforms = np.random.default_rng(seed).random(rows)
    whole = sampled_labels(predictions(logits), uniforms)
    for chunk in at_a_time:
        with patch("blockwise_lr.sharpness.sampling._rows_at_a_time", lambda logits, chunk=chunk: chunk):
            assert sampled_labels(predictions(logits), uniforms).equal(whole)


@settings(max_examples=40, deadline=None)
@given(
    counted=st.lists(st.booleans(), min_size=1, max_size=30),
    cuts=st.sets(st.integers(0, 30), max_size=4),
    ranks=st.integers(1, 3),
)
def test_the_number_of_a_sample_depends_on_the_samples_before_it_alone(counted, cuts, ranks):
    mask = torch.tensor(counted)
    expected = np.random.default_rng([3, 1]).random(int(mask.sum()))
    micro_batches = mask.tensor_split(sorted(cut for cut in cuts if cut <= len(mask)))
    alone, found = SampleNumbers([3, 1]), []
    for rows in micro_batches:
        found.append(alone.of_micro_batch(rows, None)[rows])
    assert torch.cat(found).tolist() == expected.tolist()
    several, found = [SampleNumbers([3, 1]) for _ in range(ranks)], []
    for rows in micro_batches:
        shares = rows.tensor_split(ranks)
        before = np.cumsum([0, *(int(share.sum()) for share in shares)]).tolist()
        for rank, share in enumerate(shares):
            numbers = several[rank].of_micro_batch(share, (before[rank], before[-1]))
            found.append(numbers[share])
    assert torch.cat(found).tolist() == expected.tolist()


def test_a_quarter_of_a_gpus_free_memory_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (48_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3_000_000)
    logits = Mock(shape=(10, 1000), device=torch.device("cuda"))
    assert sampling._rows_at_a_time(logits) == 1000  # of 12 kB each


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
@pytest.mark.parametrize("foreach", [False, True])
def test_squares_and_products_are_those_of_float64(shape, kind, layout, foreach, monkeypatch):
    if foreach:  # as on a GPU
        monkeypatch.setattr(tensor_sums, "_ONE_BY_ONE", frozenset())
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
    exact = 1e-12 if kind is torch.float64 or foreach or first.numel() < 1 << 16 else 5e-8
    assert parts.sums([first]).item() == pytest.approx(first.double().square().sum().item(), rel=exact)
    product = (first.double() * second.double()).sum().item()
    assert parts.sums([first], [second]).item() == pytest.approx(product, rel=1e-12)
