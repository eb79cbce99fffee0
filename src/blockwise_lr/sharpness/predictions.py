"""What a model predicts on a batch: the logits and labels that its cross-entropy is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LossFunction = Callable[[nn.Module, Any], Any]
"""``loss_fn(model, batch)``: computes one cross-entropy somewhere in it, or returns ``(logits, labels)``."""

IGNORED = -100
_CHUNK = 1 << 24  # probabilities sampled from at a time: 128 MB in float64


class Predictions(NamedTuple):
    """One row per sample (for language models: per predicted token).

    Args:
        logits: (rows, classes), with the graph that leads to the parameters.
        labels: (rows,) class indices, or (rows, classes) probabilities.
        counted: (rows,) bool, False for rows that the loss ignores (padding, labels of ``ignore_index``).
        label_smoothing: of the model's own loss.
    """

    logits: Tensor
    labels: Tensor
    counted: Tensor
    label_smoothing: float = 0.0

    @property
    def samples(self) -> int:
        """How many rows count."""
        return int(self.counted.sum())


def predict(model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> Predictions:
    """Run the model forward and take the logits and labels of its cross-entropy.

    They are read where the loss itself is computed (``torch.nn.functional.cross_entropy`` or ``nll_loss``), so
    shifted labels, padding and upcasts are the model's own, its reduction does not matter, and auxiliary losses
    (a MoE's balance) stay out.

    Args:
        model: the model.
        batch: a mapping for ``model(**batch)`` with labels in it, or a pair ``(inputs, labels)`` for
            ``model(inputs)``; whatever `loss_fn` takes, where it is given.
        loss_fn: computes the loss, where the model does not do it by itself.

    Raises:
        ValueError: no cross-entropy was computed, or more than one; class weights; labels of another shape than
            the logits; no label that counts; logits that are not finite.
        TypeError: the batch is neither a mapping nor a pair, and there is no `loss_fn`.
    """
    with _CrossEntropies() as seen:
        output = _forward(model, batch) if loss_fn is None else loss_fn(model, batch)
    if isinstance(output, tuple) and len(output) == 2 and _are_logits_and_labels(*output):
        found = _flat(output[0], output[1])
    elif len(seen.calls) == 1:
        found = seen.calls[0]
    else:
        raise ValueError(_no_single_loss(len(seen.calls), batch, loss_fn))
    if not found.counted.any():
        raise ValueError(
            f"none of the {len(found.counted)} labels of the batch counts (all are {IGNORED} or the loss's "
            "ignore_index), so there is nothing to measure: leave such batches out"
        )
    if not found.logits.requires_grad:
        raise ValueError(
            "the logits do not depend on the parameters (they carry no gradient): "
            "is the forward pass under torch.no_grad(), or the logits detached?"
        )
    return found


def sampled_labels(predictions: Predictions, uniforms: npt.NDArray[np.float64]) -> Tensor:
    """Labels drawn from the model's own softmax: the class at which its distribution function passes u.

    Args:
        predictions: of `rows` rows.
        uniforms: (rows,), in [0, 1): one for each row, counted or not.

    Returns:
        (rows,) class indices; IGNORED for the rows that do not count.

    Raises:
        ValueError: a counted row's logits hold NaN or +inf.
    """
    logits = predictions.logits.detach()
    u = torch.from_numpy(uniforms).to(logits.device).unsqueeze(1)
    labels = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    rows = max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(logits), rows):
        chunk = slice(start, start + rows)
        # float64: a sum over 50 000 classes in float32 would move labels at the tail of the distribution.
        cumulative = logits[chunk].double().softmax(-1).cumsum(-1)
        if not cumulative[predictions.counted[chunk], -1].isfinite().all():
            raise ValueError(
                "the logits are not finite (NaN or inf), so no labels can be drawn from their softmax: "
                "has the model diverged?"
            )
        found = torch.searchsorted(cumulative, u[chunk] * cumulative[:, -1:], right=True)
        labels[chunk] = found.squeeze(1).clamp_(max=logits.shape[1] - 1)
    return labels.masked_fill_(~predictions.counted, IGNORED)


def summed_loss(predictions: Predictions, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy summed over the rows that count, in float32 at least.

    Args:
        predictions: of `rows` rows.
        labels: (rows,) sampled ones. Default: those of the data, with the model's own label smoothing.
    """
    logits = predictions.logits
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if labels is not None:
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return functional.cross_entropy(
        logits,
        predictions.labels,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=predictions.label_smoothing,
    )


class _CrossEntropies(TorchFunctionMode):
    """Remembers what every cross-entropy is computed from, and lets it be 0: nothing needs its value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Predictions] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (functional.cross_entropy, functional.nll_loss):  # log-probabilities are logits too
            return self._remember(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _remember(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = IGNORED,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        if weight is not None:
            raise ValueError(
                "the loss has class weights, for which sharpness per sample is not defined here: "
                "give a loss_fn that returns (logits, labels)"
            )
        self.calls.append(_flat(input, target, ignore_index, label_smoothing))
        return input.new_zeros(target.shape if reduction == "none" else ())


def _flat(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORED, label_smoothing: float = 0.0
) -> Predictions:
    """One row a sample, of cross_entropy's (C), (N, C) and (N, C, d1, ...), or of logits (..., C), labels (...)."""
    probabilities = labels.is_floating_point()
    if labels.shape == logits.shape[:-1] and not probabilities:
        rows = logits
    elif logits.ndim > 1 and labels.shape == logits.shape[:1] + logits.shape[2:] and not probabilities:
        rows = logits.movedim(1, -1)
    elif probabilities and labels.shape == logits.shape:
        rows, labels = (t if t.ndim < 3 else t.movedim(1, -1) for t in (logits, labels))
    else:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not belong "
            "together; expected labels of the logits' shape without its class dimension"
        )
    classes = rows.shape[-1]
    rows = rows.reshape(-1, classes)
    if probabilities:
        counted = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        return Predictions(rows, labels.reshape(-1, classes), counted, label_smoothing)
    labels = labels.reshape(-1)
    counted = labels != ignore_index
    return Predictions(rows, labels.masked_fill(~counted, IGNORED), counted, label_smoothing)


def _are_logits_and_labels(first: Any, second: Any) -> bool:
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.ndim > 0
        and first.is_floating_point()
        and (not second.is_floating_point() or second.shape == first.shape)
    )


def _forward(model: nn.Module, batch: Any) -> Any:
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
    return value.to(device) if isinstance(value, Tensor) else value


def _no_single_loss(calls: int, batch: Any, loss_fn: LossFunction | None) -> str:
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
