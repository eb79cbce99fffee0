"""Find the logits and labels of a model's cross-entropy in the call that computes it."""

from __future__ import annotations

from collections.abc import Mapping
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
        counted: (rows,) bool, False for rows that the loss ignores (labels of ``ignore_index``, and rows that a mask
            leaves out of the loss).
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
        """Return how many rows count, and how many of those cannot be measured, without a host sync.

        Returns:
            (3,) float64, on the device of the logits: the rows that count, those of them whose logits are not finite,
            and those of them whose label is no class.
        """
        # The maximum of a row is NaN or inf if any logit is. A logit of -inf is valid: a class of probability 0.
        broken = self.logits.detach().amax(-1).isfinite().logical_not() & self.counted
        found = [self.counted.sum(), broken.sum()]
        if self.labels.is_floating_point():
            found.append(broken.new_zeros((), dtype=found[0].dtype))
        else:
            foreign = (self.labels < 0) | (self.labels >= self.logits.shape[1])
            found.append((foreign & self.counted).sum())
        return torch.stack(found).double()

    def without_masked_rows(self, losses: Tensor, output: Any) -> Predictions:
        """Return the predictions without the rows that do not change the loss, because a mask leaves them out.

        Args:
            losses: the losses of the rows, from which the loss was computed.
            output: what the model or the loss function returned. Without a loss in it, all rows stay.
        """
        for loss in _possible_losses(output):
            (weights,) = torch.autograd.grad(loss.sum(), losses, retain_graph=True, allow_unused=True)
            if weights is not None:
                # A mean over no rows has weights of NaN.
                counted = self.counted & (weights.reshape(-1).nan_to_num(0.0) != 0)
                labels = self.labels
                if not labels.is_floating_point():
                    labels = labels.masked_fill(~counted, IGNORED)
                return self._replace(labels=labels, counted=counted)
        return self


class CrossEntropies(TorchFunctionMode):
    """Record the inputs of every cross-entropy. Return 0 in place of a mean or a sum, whose value is not needed.

    Attributes:
        calls: the inputs of each cross-entropy.
        losses: for each call with ``reduction="none"`` the losses of its rows; None for the others.
        kinds: dtypes of all computed tensors. They show casts in a norm, autocast inside the model, and the mixed
            precision of fully_shard.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Predictions] = []
        self.losses: list[Tensor | None] = []
        self.kinds: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (functional.cross_entropy, functional.nll_loss):  # log-probabilities are logits too
            return self._remember(func, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.kinds.add(result.dtype)
        return result

    def _remember(
        self,
        func: Any,
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
        if reduction != "none":
            self.losses.append(None)
            return input.new_zeros(())
        smoothing = {"label_smoothing": label_smoothing} if label_smoothing else {}
        values: Tensor = func(
            input.detach(), target, ignore_index=ignore_index, reduction="none", **smoothing
        )
        self.losses.append(values.requires_grad_(torch.is_grad_enabled()))
        return values.clone()  # callers may write into it


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


def _possible_losses(output: Any) -> list[Tensor]:
    """Return the tensors of an output that may be its loss: itself, its "loss", or the items of a tuple."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif hasattr(output, "loss"):
        output = output.loss
    items = output if isinstance(output, (list, tuple)) else [output]
    return [each for each in items if isinstance(each, Tensor) and each.requires_grad]


def are_logits_and_labels(first: Any, second: Any) -> bool:
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.ndim > 0
        and first.is_floating_point()
        and (not second.is_floating_point() or second.shape == first.shape)
    )
