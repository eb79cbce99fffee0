"""Find the logits and labels of a model's cross-entropy in the call that computes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

IGNORED = -100


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

    def row_counts(self) -> Tensor:
        """Return the numbers of rows that count, and of those whose logits are not finite, without a host sync.

        Returns:
            (2,) float64, on the device of the logits.
        """
        # The maximum of a row is NaN or inf if any logit is. A logit of -inf is valid: a class of probability 0.
        broken = self.logits.detach().amax(-1).isfinite().logical_not() & self.counted
        return torch.stack([self.counted.sum(), broken.sum()]).double()


class CrossEntropies(TorchFunctionMode):
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
        self.calls.append(flattened(input, target, ignore_index, label_smoothing, dimensions=classes))
        return input.new_zeros(target.shape if reduction == "none" else ())


def flattened(
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


def are_logits_and_labels(first: Any, second: Any) -> bool:
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.ndim > 0
        and first.is_floating_point()
        and (not second.is_floating_point() or second.shape == first.shape)
    )
