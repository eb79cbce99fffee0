"""Logits, labels and the rows that count are those of the model's own loss, whatever form it has."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from blockwise_lr.sharpness.predictions import (
    IGNORED,
    Predictions,
    predict,
    sampled_labels,
    summed_loss,
)
from sharpness.references import VOCAB, llama, tokens


def linear(inputs=4, classes=3):
    torch.manual_seed(0)
    return nn.Linear(inputs, classes).double()


def pair(rows=6, inputs=4, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inputs, dtype=torch.float64, generator=generator)
    return x, torch.randint(classes, (rows,), generator=generator)


def given(logits, labels):
    """A loss_fn's logits and labels, which do not need a model."""
    return predict(nn.Module(), None, lambda model, batch: (logits.requires_grad_(), labels))


def computed(loss):
    """What is seen of a loss_fn that computes its loss from logits (N, C, ...) and labels."""
    return lambda logits, labels: predict(
        nn.Module(), None, lambda model, batch: loss(logits.requires_grad_(), labels)
    )


def test_a_causal_language_model_predicts_the_next_token_and_nothing_after_the_last():
    model, batch = llama(), tokens(rows=2, length=5)
    batch["labels"][0, 1] = IGNORED
    found = predict(model, batch)
    assert found.samples == 2 * 4 - 1
    counted = found.labels[found.counted]
    assert counted.tolist() == [x for x in batch["labels"][:, 1:].flatten().tolist() if x != IGNORED]
    expected = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    keep = batch["labels"][:, 1:].flatten() != IGNORED
    torch.testing.assert_close(found.logits[found.counted].double(), expected[keep], rtol=1e-6, atol=1e-6)


# Each with the class in the second dimension, as torch has it.
LOSSES = {
    "mean": functional.cross_entropy,
    "sum": lambda z, y: functional.cross_entropy(z, y, reduction="sum"),
    "none": lambda z, y: functional.cross_entropy(z, y, reduction="none").mean(),
    "module": lambda z, y: nn.CrossEntropyLoss()(z, y),
    "nll": lambda z, y: functional.nll_loss(functional.log_softmax(z, 1), y),
    "nll module": lambda z, y: nn.NLLLoss()(z.log_softmax(1), y),
    "keywords": lambda z, y: functional.cross_entropy(input=z, target=y, weight=None),
    "scaled": lambda z, y: 17 * functional.cross_entropy(z, y, reduction="sum") / len(z) + 3,
    "own logits": lambda z, y: (z, y),
    "with auxiliary losses": lambda z, y: functional.cross_entropy(z, y) + functional.mse_loss(z, z + 1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_way_to_compute_the_loss_gives_the_same_softmax_and_labels(loss):
    logits, labels = (
        torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 3, 1, 1, 2]),
    )
    found = computed(loss)(logits.clone(), labels)
    torch.testing.assert_close(found.logits.softmax(-1), logits.softmax(-1))
    assert found.labels.tolist() == labels.tolist()
    assert found.samples == 5


def test_the_losses_ignore_index_and_label_smoothing_are_kept():
    labels = torch.tensor([0, 2, 1, 0])
    found = computed(lambda z, y: functional.cross_entropy(z, y, ignore_index=0, label_smoothing=0.1))(
        torch.randn(4, 3), labels
    )
    assert found.counted.tolist() == [False, True, True, False]
    assert found.labels.tolist() == [IGNORED, 2, 1, IGNORED]
    expected = functional.cross_entropy(
        found.logits, labels, ignore_index=0, label_smoothing=0.1, reduction="sum"
    )
    assert summed_loss(found).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 3), (3, 3, 3, 3)])
def test_dense_predictions_have_their_classes_where_the_loss_has_them(shape):
    # The last two shapes could be read either way: cross_entropy knows only one.
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    found = computed(functional.cross_entropy)(logits, labels)
    expected = functional.cross_entropy(logits, labels, reduction="sum")
    assert found.samples == labels.numel()
    assert summed_loss(found).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "labels_shape"),
    [((2, 5, 3), (2, 5)), ((2, 3, 5), (2, 5)), ((2, 3, 4, 5), (2, 4, 5)), ((3, 3, 3), (3, 3)), ((3,), ())],
)
def test_a_pair_has_its_classes_last_and_second_only_where_last_does_not_fit(shape, labels_shape):
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(labels_shape, dtype=torch.int64)
    found = given(logits, labels)
    last = shape[:-1] == labels_shape
    rows = (logits if last else logits.movedim(1, -1)).reshape(-1, 3)
    assert torch.equal(found.logits.detach(), rows)
    assert found.samples == labels.numel()


def test_probabilities_are_labels_too():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    soft = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    found = computed(functional.cross_entropy)(logits, soft)
    expected = functional.cross_entropy(logits, soft, reduction="sum")
    assert found.samples == 8
    assert summed_loss(found).item() == pytest.approx(expected.item(), rel=1e-6)
    last = given(logits.movedim(1, -1), soft.movedim(1, -1))
    assert summed_loss(last).item() == pytest.approx(expected.item(), rel=1e-6)


def test_probabilities_of_half_precision_meet_logits_of_half_precision():
    soft = torch.rand(6, 11).softmax(-1).bfloat16()
    found = given(torch.randn(6, 11).bfloat16(), soft)
    assert summed_loss(found).dtype == torch.float32


def test_a_pair_of_inputs_and_labels_needs_no_loss():
    x, y = pair()

    class Wrapped(nn.Linear):
        def forward(self, inputs):
            return SimpleNamespace(logits=super().forward(inputs))  # as transformers' classifiers answer

    for model in (nn.Linear(4, 3).double(), Wrapped(4, 3).double()):
        found = predict(model, (x, y))
        assert torch.equal(found.logits, nn.Linear.forward(model, x))
        assert torch.equal(found.labels, y)


def test_a_model_that_returns_two_tensors_has_not_returned_logits_and_labels():
    class Model(nn.Linear):
        def forward(self, x, labels):
            logits = super().forward(x)
            functional.cross_entropy(logits, labels)
            return logits + 1, logits.argmax(-1)

    x, y = pair()
    model = Model(4, 3).double()
    found = predict(model, {"x": x, "labels": y})
    assert torch.equal(found.labels, y)
    assert torch.equal(found.logits, nn.Linear.forward(model, x))


def test_the_types_that_the_forward_pass_computed_are_known():
    assert torch.float32 in predict(llama(), tokens()).kinds  # RMSNorm
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(nn.Linear(4, 3), (torch.randn(2, 4), torch.tensor([0, 1])))
    assert torch.bfloat16 in found.kinds


# Labels from the model's own softmax
# ------------------------------------------------------------------------------------------------------


def rows_of(logits, counted=None):
    logits = torch.as_tensor(logits, dtype=torch.float64)
    counted = torch.ones(len(logits), dtype=torch.bool) if counted is None else torch.tensor(counted)
    return Predictions(logits, torch.zeros(len(logits), dtype=torch.int64), counted)


def test_a_label_is_where_the_distribution_function_passes_the_number_drawn():
    p = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0], dtype=torch.float64)
    u = np.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53])
    predictions = rows_of(p.log().expand(6, -1))
    assert sampled_labels(predictions, u).tolist() == [1, 1, 2, 2, 4, 4]


def test_sampled_labels_follow_the_softmax():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = 20_000
    drawn = sampled_labels(rows_of(logits.expand(n, -1)), np.random.default_rng(0).random(n))
    counts = torch.bincount(drawn, minlength=VOCAB)
    assert stats.chisquare(counts, n * logits.softmax(-1)).pvalue > 0.01


def test_rows_that_do_not_count_get_no_label():
    predictions = rows_of(torch.zeros(3, 2), counted=[True, False, True])
    assert sampled_labels(predictions, np.array([0.9, 0.1])).tolist() == [1, IGNORED, 0]


def test_logits_of_half_precision_are_summed_in_float32():
    predictions = rows_of(torch.zeros(3, 2))
    half = predictions._replace(logits=predictions.logits.bfloat16())
    assert summed_loss(half).dtype == torch.float32
    assert summed_loss(predictions).dtype == torch.float64


# What cannot be measured, and what is said
# ------------------------------------------------------------------------------------------------------


def test_a_batch_without_labels_is_refused_with_what_it_has():
    with pytest.raises(
        ValueError, match=r"no loss was computed, and the batch has no labels \(only input_ids\): add them"
    ):
        predict(llama(), {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})


def test_another_loss_is_refused():
    x, _ = pair()
    with pytest.raises(
        ValueError, match=r"no cross-entropy was computed .* give a loss_fn that returns \(logits, labels\)"
    ):
        predict(linear(), None, lambda model, batch: functional.mse_loss(model(x), torch.zeros(6, 3)))


def test_two_losses_in_one_pass_are_refused():
    x, y = pair()

    def both(model, batch):
        logits = model(x)
        return functional.cross_entropy(logits, y) + functional.cross_entropy(logits, y)

    with pytest.raises(
        ValueError, match="2 cross-entropies were computed in one forward pass; expected one: give a loss_fn"
    ):
        predict(linear(), None, both)


def test_class_weights_are_refused():
    x, y = pair()
    with pytest.raises(
        ValueError, match="the loss has class weights, for which sharpness per sample is not defined"
    ):
        predict(
            linear(),
            None,
            lambda model, batch: functional.cross_entropy(model(x), y, weight=torch.ones(3).double()),
        )


@pytest.mark.parametrize("see", [given, computed(functional.cross_entropy)])
def test_labels_of_another_shape_are_refused_with_both_shapes(see):
    message = (
        r"logits of shape \(6, 3\) and labels of shape \(5,\) do not belong together; expected labels of"
    )
    with pytest.raises(ValueError, match=message):
        see(torch.zeros(6, 3), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    "labels", [torch.randn(6, 3), torch.full((6, 3), 0.5), torch.tensor([[2.0, -1, 0]] * 6)]
)
def test_targets_of_a_regression_are_refused(labels):
    message = r"labels of type torch.float32 are probabilities of the 3 classes, but these are negative or do not add"
    with pytest.raises(ValueError, match=message):
        given(torch.zeros(6, 3), labels)


def test_a_batch_of_which_no_label_counts_is_refused():
    x, y = pair()
    message = r"no label of the batch counts \(all are -100 or the loss's ignore_index\), so there is nothing"
    with pytest.raises(ValueError, match=message):
        predict(linear(), (x, torch.full_like(y, IGNORED)))


def test_logits_without_a_graph_are_refused():
    x, y = pair()
    message = r"the logits do not depend on the parameters .*: is the forward pass under torch.no_grad\(\)"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        predict(linear(), (x, y))
    assert predict(linear(), (x, y), needs_gradient=False).samples == 6


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_of_a_diverged_model_are_refused(broken):
    logits = torch.zeros(3, 4)
    logits[1, 2] = broken
    message = (
        r"the logits are not finite \(NaN or inf\), so their softmax is not defined: has the model diverged\?"
    )
    with pytest.raises(ValueError, match=message):
        given(logits, torch.tensor([0, 1, 2]))
    # Padding may hold anything, and a class that cannot be is -inf.
    assert given(logits.detach(), torch.tensor([0, IGNORED, 2])).samples == 2
    logits = torch.zeros(3, 4)
    logits[:, 0] = -float("inf")
    assert given(logits, torch.tensor([1, 1, 2])).samples == 3


@pytest.mark.parametrize(
    ("batch", "name"), [(torch.zeros(2, 4), "Tensor"), ("text", "str"), ((1, 2, 3), "tuple")]
)
def test_a_batch_of_another_kind_is_refused(batch, name):
    message = rf"a batch is a {name}; expected a mapping for model\(\*\*batch\), labels included, or a pair"
    with pytest.raises(TypeError, match=message):
        predict(linear(), batch)
