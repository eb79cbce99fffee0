"""The estimators of tr(H_b), the trace of each part's curvature: one function each, one call for each batch.

H is the Hessian or the Gauss-Newton matrix of the mean loss over B samples, and H_b its diagonal block for part b.
The sharpness of b is tr(H_b) / #(b) (arXiv 2502.19002, section 3). Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from blockwise_lr.distributed import local
from blockwise_lr.sharpness import hessian
from blockwise_lr.sharpness.gradient_sums import GradientSum, SquareSums
from blockwise_lr.sharpness.model_gradients import MeasuredModel, gradients_of_sum, stream_gradients
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.predictions import check_counts, sampled_labels, summed_loss
from blockwise_lr.sharpness.sampling import SampleNumbers
from blockwise_lr.sharpness.tensor_sums import accumulation_dtype, to_device

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


@dataclass(frozen=True)
class Draws:
    """The draws from one batch, on the model's device.

    Args:
        sums: (probes, parts) float64, estimates of tr(H_b) times the number of samples.
        rows: (micro-batches, 2) float64, as :meth:`Predictions.row_counts`, over all processes.
        gradients: gradients of the loss summed over the samples, from the last probe, for histograms of elements.
            None if they were not kept.
    """

    sums: Tensor
    rows: Tensor
    gradients: Sequence[Tensor | None] | None = None

    @property
    def samples(self) -> Tensor:
        """B, the number of samples over all processes and micro-batches, as a tensor on the device."""
        return self.rows[:, 0].sum()


def traces_on_host(
    draws: Sequence[Draws], *, may_be_empty: bool
) -> tuple[list[npt.NDArray[np.float64]], list[int]]:
    """Return the (probes, parts) traces and the number of samples of every batch.

    The host waits for the device once.

    Args:
        draws: the draws of all batches.
        may_be_empty: accept micro-batches without labels that count, if there are others.

    Raises:
        ValueError: no label of a batch counts, or the logits are not finite.
    """
    flat = torch.cat([each for draw in draws for each in (draw.sums.flatten(), draw.rows.flatten())])
    values = np.array(flat.tolist())
    traces, samples, at = [], [], 0
    for draw in draws:
        sums, at = values[at : at + draw.sums.numel()].reshape(draw.sums.shape), at + draw.sums.numel()
        rows, at = values[at : at + draw.rows.numel()].reshape(draw.rows.shape), at + draw.rows.numel()
        for counted, broken in rows:
            check_counts(counted, broken, may_be_empty=may_be_empty)
        samples.append(int(rows[:, 0].sum()))
        check_counts(samples[-1], 0, may_be_empty=False)
        traces.append(sums / samples[-1])
    return traces, samples


def fisher(measured: MeasuredModel, batch: Sequence[Any], *, seed: Sequence[int], probes: int, keep_gradients: bool = False) -> Draws:
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
            more = probe + 1 < probes and not measured.parts.sharded
            stream_gradients(measured, summed_loss(predictions, labels), collector.add, keep_graph=more)
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
        stream_gradients(measured, summed_loss(predictions), collected.add)
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


def optimizer(
    parts: ParameterParts, adam: Optimizer, samples: int, *, keep_gradients: bool = False
) -> Draws:
    r"""Read the estimate from Adam's second moment, for runs that cannot afford a backward pass.

        tr(G_b) ~ B sum_i v_i / (1 - beta2^t)

    This averages `empirical` over the last 1 / (1 - beta2) steps, with the labels of the data and after clipping.
    Clipping reduces the weight of a step equally in all blocks.

    Args:
        parts: the parts of the model's parameters.
        adam: an optimizer with ``exp_avg_sq`` in its state (Adam, AdamW, NAdam ...), after any number of steps.
        samples: B, the number of samples in the mean loss of one step.
        keep_gradients: return the roots of the moments, scaled as gradients.

    Raises:
        ValueError: a parameter has no second moment: the optimizer is of another kind, has taken no step, or is not of
            this model.
    """
    moments, steps = [], []
    for i, parameter in enumerate(parts.parameters):
        state = adam.state.get(parameter, {})
        if "exp_avg_sq" not in state or state["exp_avg_sq"].shape != parameter.shape:
            raise ValueError(
                f"{type(adam).__name__} keeps no second moment (exp_avg_sq) of the model's parameter "
                f"number {i}, {parts.names[i]}; its state has {sorted(state) or 'nothing'}: "
                "expected an Adam-like optimizer of this model that has taken a step"
            )
        moments.append(state["exp_avg_sq"])
        steps.append(state["step"])
    beta2 = {id(p): group.get("betas", (0, 0))[1] for group in adam.param_groups for p in group["params"]}
    unbiased = [1 - beta2[id(p)] ** step for p, step in zip(parts.parameters, _numbers(steps))]
    sums, kept = SquareSums(parts), []
    for indices in parts.in_eighths():
        # Treat the root of the moment as one gradient of the summed loss, B times that of the mean loss.
        roots = [
            torch.empty_like(local(moments[i]), dtype=accumulation_dtype(moments[i])) for i in indices
        ]
        torch._foreach_copy_(roots, [local(moments[i]) for i in indices])
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(roots, [samples / math.sqrt(unbiased[i]) for i in indices])
        sums.add(indices, roots)
        kept += roots if keep_gradients else []
    rows = torch.tensor([[float(samples), 0.0]], dtype=torch.float64, device=sums.totals.device)
    return Draws(parts.over_shards(sums.totals).unsqueeze(0), rows, kept or None)


def _numbers(values: Sequence[Any]) -> list[float]:
    """Return numbers and tensors as floats. The host waits once, however many tensors are on a device."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    on_host = iter(torch.stack([to_device(t.float(), tensors[0].device) for t in tensors]).tolist() if tensors else [])
    return [next(on_host) if isinstance(value, Tensor) else float(value) for value in values]


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
    return Draws(torch.stack(sums), sums[0].new_tensor([[samples, 0]]))


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
