"""predict: run a model on a batch and return the logits and labels of its cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from blockwise_lr.fp32 import HALF
from blockwise_lr.sharpness.cross_entropies import IGNORED as IGNORED
from blockwise_lr.sharpness.cross_entropies import CrossEntropies, are_logits_and_labels, flattened
from blockwise_lr.sharpness.cross_entropies import Predictions as Predictions
from blockwise_lr.sharpness.sampling import classes_at, numbers_of_rows
from blockwise_lr.sharpness.tensor_sums import to_device

LossFunction = Callable[[nn.Module, Any], Any]
"""``loss_fn(model, batch)`` computes one cross-entropy, or returns ``(logits, labels)``."""

NO_LABELS = (
    f"no label of the batch counts (all are {IGNORED} or the loss's ignore_index), so there is nothing to measure: "
    "leave such batches out"
)


def predict(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    needs_gradient: bool = True,
    may_be_empty: bool = False,
    check_rows: bool = True,
) -> Predictions:
    """Run the model forward, and return the logits and labels of its cross-entropy.

    They are taken from the call that computes the loss (``torch.nn.functional.cross_entropy`` or ``nll_loss``). So
    label shifts, padding and upcasts are the model's own, the reduction does not matter, and auxiliary losses (such
    as the load balancing of an MoE) are left out. A row counts unless its label is ignored, or its loss
    (``reduction="none"``) has weight 0 in the loss that is returned. All rows that count have equal weights.

    Args:
        model: the model.
        batch: a mapping for ``model(**batch)`` that contains labels, or a pair ``(inputs, labels)`` for
            ``model(inputs)``. With `loss_fn`: whatever that takes.
        loss_fn: computes the loss, for a model that does not. Default: none.
        needs_gradient: refuse logits without a graph. Default: True.
        may_be_empty: accept a batch without labels that count. Default: False.
        check_rows: refuse a batch without labels that count, and logits that are not finite. The host waits for the
            device. If False, the caller passes ``Predictions.row_counts`` to :func:`check_counts` later. Default: True.

    Returns:
        Predictions. If logits and labels are a pair, the classes are the last dimension of the logits, as in
        ``(N, length, C)``. If the labels' shape does not fit, they are the second dimension, as in
        ``(N, C, height, width)``.

    Raises:
        ValueError: the model computes no cross-entropy, or several; the loss has class weights; the labels' shape does
            not fit the logits; float labels are not probabilities; no label counts; a label that counts is no class;
            the logits of a row that counts are not finite; or the logits have no graph.
        TypeError: the batch is neither a mapping nor a pair, and there is no `loss_fn`.
    """
    with CrossEntropies() as seen:
        output = _forward(model, batch) if loss_fn is None else loss_fn(model, batch)
    paired = loss_fn is not None or not isinstance(batch, Mapping)
    if paired and isinstance(output, tuple) and len(output) == 2 and are_logits_and_labels(*output):
        found = flattened(output[0], output[1], dimensions=(-1, 1))
    elif len(seen.calls) == 1:
        found, losses = seen.calls[0], seen.losses[0]
        if losses is not None:
            found = found.without_masked_rows(losses, output)
    else:
        raise ValueError(_no_single_loss(len(seen.calls), batch, loss_fn))
    if needs_gradient and not found.logits.requires_grad:
        raise ValueError(
            "the logits do not depend on the parameters (they carry no gradient): "
            "is the forward pass under torch.no_grad(), or the logits detached?"
        )
    if check_rows:
        check_counts(*found.row_counts().tolist(), may_be_empty=may_be_empty)
    return found._replace(kinds=frozenset(seen.kinds))


def check_counts(samples: float, broken: float, foreign: float, *, may_be_empty: bool) -> None:
    """Check the numbers of :meth:`Predictions.row_counts`.

    Raises:
        ValueError: no row counts, unless `may_be_empty`; the label of a row that counts is no class; or its logits are
            not finite.
    """
    if not samples and not may_be_empty:
        raise ValueError(NO_LABELS)
    if foreign:
        raise ValueError(
            f"{round(foreign)} labels are below 0, or not below the number of classes; expected class indices, or "
            f"{IGNORED} for rows that do not count"
        )
    if broken:
        raise ValueError(
            "the logits are not finite (NaN or inf), so their softmax is not defined: has the model diverged?"
        )


def sampled_labels(predictions: Predictions, uniforms: npt.NDArray[np.float64] | Tensor) -> Tensor:
    """Return labels drawn from the model's own softmax: the class at which its distribution function passes u.

    Args:
        predictions: predictions with `rows` rows.
        uniforms: values of u in [0, 1): (samples,) for the rows that count, or a tensor with one for each row.

    Returns:
        (rows,) class indices; IGNORED in the rows that do not count.
    """
    logits, counted = predictions.logits.detach(), predictions.counted
    if not isinstance(uniforms, Tensor):
        uniforms = numbers_of_rows(uniforms, counted, 0)
    return classes_at(logits, uniforms).masked_fill_(~counted, IGNORED)


def summed_loss(predictions: Predictions, labels: Tensor | None = None) -> Tensor:
    """Return the cross-entropy summed over the rows that count, in float32 or higher.

    Args:
        predictions: predictions with `rows` rows.
        labels: (rows,) sampled labels. Default: the labels of the data, with the model's own label smoothing.
    """
    logits = predictions.logits
    if logits.dtype in HALF:
        logits = logits.float()
    if labels is not None:
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    labels = predictions.labels
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
        # No probabilities mean "ignored", so a row that does not count becomes constant and has no gradient.
        logits = logits.masked_fill(~predictions.counted.unsqueeze(1), 0.0)
    return functional.cross_entropy(
        logits,
        labels,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=predictions.label_smoothing,
    )


def _forward(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch that is a mapping or a pair, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{name: _moved(value, device) for name, value in batch.items()})
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        inputs, labels = (_moved(part, device) for part in batch)
        output = model(inputs)
        return getattr(output, "logits", output), labels
    raise TypeError(
        f"a batch is a {type(batch).__name__}; expected a mapping for model(**batch), labels included, or a pair "
        "(inputs, labels), or give loss_fn(model, batch)"
    )


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    # A tensor made under torch.inference_mode() cannot be in a graph, but its copy can.
    return to_device(value.clone() if value.is_inference() else value, device)


def _no_single_loss(calls: int, batch: Any, loss_fn: LossFunction | None) -> str:
    """Return the error message for a forward pass without exactly one cross-entropy."""
    if calls > 1:
        return (
            f"{calls} cross-entropies were computed in one forward pass; expected one: "
            "give a loss_fn that returns (logits, labels) of the one to measure"
        )
    if loss_fn is None and isinstance(batch, Mapping) and "labels" not in batch:
        return (
            f"no loss was computed, and the batch has no labels (only {', '.join(map(str, batch))}): "
            'add them ({"input_ids": ids, "labels": ids} for a causal language model)'
        )
    return (
        "no cross-entropy was computed (torch.nn.functional.cross_entropy, as the models of transformers do); "
        "give a loss_fn that returns (logits, labels)"
    )
