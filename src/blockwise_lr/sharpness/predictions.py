"""predict: run a model on a batch and return the logits and labels of its cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from blockwise_lr.sharpness.sampling import classes_at

LossFunction = Callable[[nn.Module, Any], Any]
"""``loss_fn(model, batch)`` computes one cross-entropy, or returns ``(logits, labels)``."""

IGNORED = -100
HALF = frozenset((torch.float16, torch.bfloat16))
NO_LABELS = (
    f"no label of the batch counts (all are {IGNORED} or the loss's ignore_index), so there is nothing to measure: "
    "leave such batches out"
)


class Predictions(NamedTuple):
    """The logits and labels of a batch, one row for each sample (in a language model: each predicted token).

    Args:
        logits: (rows, classes), with the graph to the parameters.
        labels: (rows,) class indices, or (rows, classes) probabilities.
        counted: (rows,) bool, False for rows that the loss ignores (padding, labels of ``ignore_index``).
        label_smoothing: label smoothing of the model's own loss.
        kinds: dtypes of all tensors that the forward pass computed.
    """

    logits: Tensor
    labels: Tensor
    counted: Tensor
    label_smoothing: float = 0.0
    kinds: frozenset[torch.dtype] = frozenset()

    @property
    def samples(self) -> int:
        """The number of rows that count."""
        return int(self.counted.sum())


def predict(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    needs_gradient: bool = True,
    may_be_empty: bool = False,
) -> Predictions:
    """Run the model forward, and return the logits and labels of its cross-entropy.

    They are taken from the call that computes the loss (``torch.nn.functional.cross_entropy`` or ``nll_loss``). So
    label shifts, padding and upcasts are the model's own, the reduction does not matter, and auxiliary losses (such
    as the load balancing of an MoE) are left out.

    Args:
        model: the model.
        batch: a mapping for ``model(**batch)`` that contains labels, or a pair ``(inputs, labels)`` for
            ``model(inputs)``. With `loss_fn`: whatever that takes.
        loss_fn: computes the loss, for a model that does not. Default: none.
        needs_gradient: refuse logits without a graph. Default: True.
        may_be_empty: accept a batch without labels that count. Default: False.

    Returns:
        Predictions. If logits and labels are a pair, the classes are the last dimension of the logits, as in
        ``(N, length, C)``. If the labels' shape does not fit, they are the second dimension, as in
        ``(N, C, height, width)``.

    Raises:
        ValueError: the model computes no cross-entropy, or several; the loss has class weights; the labels' shape does
            not fit the logits; float labels are not probabilities; no label counts; the logits of a row that counts are
            not finite; or the logits have no graph.
        TypeError: the batch is neither a mapping nor a pair, and there is no `loss_fn`.
    """
    with _CrossEntropies() as seen:
        output = _forward(model, batch) if loss_fn is None else loss_fn(model, batch)
    paired = loss_fn is not None or not isinstance(batch, Mapping)
    if paired and isinstance(output, tuple) and len(output) == 2 and _are_logits_and_labels(*output):
        found = _flat(output[0], output[1], dimensions=(-1, 1))
    elif len(seen.calls) == 1:
        found = seen.calls[0]
    else:
        raise ValueError(_no_single_loss(len(seen.calls), batch, loss_fn))
    if not may_be_empty and not found.counted.any():
        raise ValueError(NO_LABELS)
    if needs_gradient and not found.logits.requires_grad:
        raise ValueError(
            "the logits do not depend on the parameters (they carry no gradient): "
            "is the forward pass under torch.no_grad(), or the logits detached?"
        )
    # The maximum of a row is NaN or inf if any logit is. A logit of -inf is valid: a class of probability 0.
    if not found.logits.detach().amax(-1)[found.counted].isfinite().all():
        raise ValueError(
            "the logits are not finite (NaN or inf), so their softmax is not defined: has the model diverged?"
        )
    return found._replace(kinds=frozenset(seen.kinds))


def sampled_labels(predictions: Predictions, uniforms: npt.NDArray[np.float64]) -> Tensor:
    """Return labels drawn from the model's own softmax: the class at which its distribution function passes u.

    Args:
        predictions: predictions with `rows` rows.
        uniforms: (samples,) values of u in [0, 1), one for each row that counts.

    Returns:
        (rows,) class indices; IGNORED in the rows that do not count.
    """
    logits = predictions.logits.detach()
    u = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    u[predictions.counted] = torch.from_numpy(uniforms).to(logits.device)
    return classes_at(logits, u).masked_fill_(~predictions.counted, IGNORED)


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
    return functional.cross_entropy(
        logits,
        labels.to(logits.dtype) if labels.is_floating_point() else labels,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=predictions.label_smoothing,
    )


class _CrossEntropies(TorchFunctionMode):
    """Record the inputs of every cross-entropy, and return 0 in its place, because its value is not needed.

    Attributes:
        calls: the inputs of each cross-entropy.
        kinds: dtypes of all computed tensors. They show casts in a norm, autocast inside the model, and the mixed
            precision of fully_shard.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Predictions] = []
        self.kinds: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (functional.cross_entropy, functional.nll_loss):  # log-probabilities are logits too
            return self._remember(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.kinds.add(result.dtype)
        return result

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
        classes = (0 if input.ndim == 1 else 1,)
        self.calls.append(_flat(input, target, ignore_index, label_smoothing, dimensions=classes))
        return input.new_zeros(target.shape if reduction == "none" else ())


def _flat(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    *,
    dimensions: tuple[int, ...],
) -> Predictions:
    """Return predictions with one row for each sample.

    Args:
        dimensions: the dimensions of the logits that may count classes. The first that fits the labels is used.
    """
    probabilities = labels.is_floating_point()
    for dimension in dimensions:
        if dimension >= logits.ndim or (probabilities and labels.ndim != logits.ndim):
            continue
        rows = logits.movedim(dimension, -1)
        answers = labels.movedim(dimension, -1) if probabilities else labels
        if answers.shape == (rows.shape if probabilities else rows.shape[:-1]):
            break
    else:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not belong "
            "together; expected labels of the logits' shape without its class dimension"
        )
    rows = rows.reshape(-1, rows.shape[-1])
    if probabilities:
        answers = answers.reshape(rows.shape)
        sums = answers.sum(-1)
        if (answers < 0).any() or (sums - 1).abs().max() > 0.02:  # bfloat16 rounds the sum to 1 +- 0.01
            raise ValueError(
                f"labels of type {labels.dtype} are probabilities of the {rows.shape[1]} classes, but these are "
                f"negative or do not add up to 1 (they add up to {sums.min():.3g} to {sums.max():.3g}); class indices "
                "are integers"
            )
        counted = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        return Predictions(rows, answers, counted, label_smoothing)
    answers = answers.reshape(-1)
    counted = answers != ignore_index
    return Predictions(rows, answers.masked_fill(~counted, IGNORED), counted, label_smoothing)


def _are_logits_and_labels(first: Any, second: Any) -> bool:
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.ndim > 0
        and first.is_floating_point()
        and (not second.is_floating_point() or second.shape == first.shape)
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
    return value.clone().to(device) if value.is_inference() else value.to(device)


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
