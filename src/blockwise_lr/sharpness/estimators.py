"""The estimators of tr(H_b), the trace of each part's curvature: one function each, one call for each batch.

H is the Hessian or the Gauss-Newton matrix of the mean loss over B samples, and H_b its diagonal block for part b.
The sharpness of b is tr(H_b) / #(b) (arXiv 2502.19002, section 3). Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from blockwise_lr.sharpness import hessian
from blockwise_lr.sharpness.adam_moments import optimizer
from blockwise_lr.sharpness.draws import Draws
from blockwise_lr.sharpness.gradient_sums import GradientSum, SquareSums
from blockwise_lr.sharpness.model_gradients import MeasuredModel, gradients_of_sum, stream_gradients
from blockwise_lr.sharpness.predictions import sampled_labels, summed_loss
from blockwise_lr.sharpness.sampling import SampleNumbers

__all__ = [
    "ESTIMATORS",
    "Draws",
    "HessianProducts",
    "MeasuredModel",
    "empirical",
    "fisher",
    "gradients_of_sum",
    "hutchinson",
    "optimizer",
]

HessianProducts = Literal["auto", "double-backward", "finite-differences"]


def fisher(
    measured: MeasuredModel,
    batch: Sequence[Any],
    *,
    seed: Sequence[int],
    probes: int,
    keep_gradients: bool = False,
) -> Draws:
    r"""Estimate the Gauss-Newton trace with labels sampled from the model's own softmax.

        tr(G_b) = E_y~softmax  B ||grad_b Lhat_B(y)||^2

    This is unbiased for the Gauss-Newton matrix of a cross-entropy, which is its Fisher information. The gradients of
    different samples are independent with mean 0, so their cross terms vanish. This is the Gauss-Newton-Bartlett
    estimator of Sophia, arXiv 2305.14342.

    A sample's label depends only on the seed and on the number of samples before it in the global batch. So padding and
    the numbers of processes and micro-batches do not matter.

    Args:
        measured: the model.
        batch: this process's micro-batches. Their gradients are added up.
        seed: numbers that seed the random labels of this batch.
        probes: draws of labels for the batch. All share one forward pass, and each has a backward pass. With several
            micro-batches, the gradients of all probes stay in memory until the last micro-batch.
        keep_gradients: return the gradients of the last probe.

    Raises:
        ValueError: the errors of :func:`predict`, but for those of :func:`check_counts`.
    """
    numbers = [SampleNumbers([*seed, probe]) for probe in range(probes)]
    collected = [_collector(measured, batch, keep_gradients) for _ in range(probes)]
    rows: list[Tensor] = []
    for micro_batch in batch:
        predictions = measured.predict(micro_batch, check_rows=False)
        elsewhere = measured.sample_range(predictions)
        rows.append(measured.row_counts(predictions))
        for probe, (drawn, collector) in enumerate(zip(numbers, collected)):
            # fully_shard allows one backward pass for each forward pass.
            if probe > 0 and measured.parts.sharded:
                predictions = measured.predict(micro_batch, check_rows=False)
            labels = sampled_labels(predictions, drawn.of_micro_batch(predictions.counted, elsewhere))
            loss, more = summed_loss(predictions, labels), probe + 1 < probes
            if not more:
                del predictions  # the logits, which the backward pass does not need
            keep_graph = more and not measured.parts.sharded
            stream_gradients(measured, loss, collector.add, keep_graph=keep_graph)
    sums, gradients = [], None
    while collected:  # releases the gradients of each probe
        found, gradients = _squares(measured, collected.pop(0), keep_gradients)
        sums.append(found)
    return Draws(torch.stack(sums), torch.stack(rows), gradients)


def empirical(measured: MeasuredModel, batch: Sequence[Any], *, keep_gradients: bool = False) -> Draws:
    r"""Estimate the trace with the labels of the data, from the gradient that training computes anyway.

        E[B ||g_b||^2] = tr(Cov_b) + B ||E g_b||^2

    It is biased if the mean gradient is not small against its noise, and more so in larger batches. It is also
    biased if the model does not fit the data, because the covariance of the gradients is then not the Fisher matrix.

    Args:
        measured: the model.
        batch: this process's micro-batches. Their gradients are added up.
        keep_gradients: return the gradients.

    Raises:
        ValueError: as :func:`fisher`.
    """
    rows: list[Tensor] = []
    collected = _collector(measured, batch, keep_gradients)
    for micro_batch in batch:
        predictions = measured.predict(micro_batch, check_rows=False)
        rows.append(measured.row_counts(predictions))
        loss = summed_loss(predictions)
        del predictions  # the logits, which the backward pass does not need
        stream_gradients(measured, loss, collected.add)
    sums, gradients = _squares(measured, collected, keep_gradients)
    return Draws(sums.unsqueeze(0), torch.stack(rows), gradients)


def hutchinson(
    measured: MeasuredModel,
    batch: Sequence[Any],
    *,
    seed: Sequence[int],
    probes: int,
    products: HessianProducts,
) -> tuple[Draws, str]:
    r"""Estimate the traces of the true Hessian's blocks from Hessian-vector products with random signs.

        tr(H_b) = E_v  v_b' (H v)_b        v_i = +-1                                              (Hutchinson 1990)

    One product serves all blocks, because the terms that couple two blocks have mean 0. Autocast is off.

    Args:
        measured, batch, seed, probes: as in :func:`fisher`. The signs depend only on the seed and the parameter.
        products: how to compute the products.

            - "double-backward" needs an attention kernel that can be differentiated twice. It selects torch's math
              kernel.
            - "finite-differences" of gradients needs float32 or float64 throughout. The error is about 1e-3 of a
              block in float32, and 1e-7 if the model casts nothing below float64.
            - "auto" uses the second if the first is unavailable or unreliable (the model has autograd functions of its
              own).

    Returns:
        The draws, and the kind of products that was used.

    Raises:
        ValueError: finite differences in half precision, whose rounding would hide the curvature; a double backward
            pass of sharded parameters, which fully_shard does not support; no label of the batch counts; and the
            errors of :func:`predict`.
        RuntimeError: "double-backward" of a model that has no double backward pass.
    """
    if products == "double-backward" and measured.parts.sharded:
        raise ValueError(
            "parameters that are sharded (DTensors) have no double backward pass: "
            'use hvp="finite-differences", or "auto"'
        )
    draw = partial(_hutchinson, measured, batch, seed, probes)
    if products == "auto" and not measured.parts.sharded:
        try:
            return draw(partial(hessian.double_backward, strict=True)), "double-backward"
        except RuntimeError as error:
            if not hessian.has_no_double_backward(error):
                raise
    if products == "double-backward":
        return draw(partial(hessian.double_backward, strict=False)), products
    with hessian.no_autocast(measured):
        step = hessian.step_size(measured, batch)
    return draw(partial(hessian.finite_difference, step=step)), "finite-differences"


def _hutchinson(
    measured: MeasuredModel,
    batch: Sequence[Any],
    seed: Sequence[int],
    probes: int,
    product: Callable[..., Any],
) -> Draws:
    """Draw from one batch with `product`, a function for Hessian-vector products."""
    parts, sums, samples = measured.parts, [], 0
    with hessian.no_autocast(measured):
        for probe in range(probes):
            signs = [
                hessian.random_signs(parameter, [*seed, probe, i])
                for i, parameter in enumerate(parts.parameters)
            ]
            total, samples = product(measured, batch, signs)
            totals = torch.zeros(len(parts), dtype=torch.float64, device=parts.parameters[0].device)
            parts.add_products(parts.sum_over_processes(total), signs, totals)
            sums.append(parts.over_shards(totals))
    return Draws(torch.stack(sums), sums[0].new_tensor([[samples, 0, 0]]))


def _collector(
    measured: MeasuredModel, batch: Sequence[Any], keep_gradients: bool
) -> SquareSums | GradientSum:
    """Return what takes the gradients of a batch: only their squares where they need not be added up first."""
    parts = measured.parts
    if len(batch) > 1 or parts.distributed or keep_gradients:
        return GradientSum(parts)
    return SquareSums(parts)


def _squares(
    measured: MeasuredModel, collected: SquareSums | GradientSum, keep_gradients: bool
) -> tuple[Tensor, list[Tensor | None] | None]:
    """Return the sum of squares of each part over all processes, and the gradients if they are kept."""
    parts, kept = measured.parts, None
    if isinstance(collected, SquareSums):
        return parts.over_shards(collected.totals), None
    sums = SquareSums(parts)
    if keep_gradients:
        kept = parts.sum_over_processes(collected.tensors)
        sums.add(range(len(kept)), kept)
    else:
        for indices, group in parts.in_groups_over_processes(collected.tensors):
            sums.add(indices, group)
    return parts.over_shards(sums.totals), kept


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "fisher": fisher,
    "empirical": empirical,
    "hutchinson": hutchinson,
    "optimizer": optimizer,
}
