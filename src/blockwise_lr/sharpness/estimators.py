"""The estimators of tr(H_b), the trace of each part's curvature: one function each, one call for each batch.

H is the Hessian or the Gauss-Newton matrix of the mean loss over B samples, and H_b its diagonal block for part b.
The sharpness of b is tr(H_b) / #(b) (arXiv 2502.19002, section 3). Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from blockwise_lr.sharpness import hessian
from blockwise_lr.sharpness.model_gradients import MeasuredModel, gradients_of_sum
from blockwise_lr.sharpness.parameter_parts import ParameterParts, accumulation_dtype, add
from blockwise_lr.sharpness.predictions import NO_LABELS, sampled_labels, summed_loss

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
    """The draws from one batch.

    Args:
        traces: (probes, parts) float64, estimates of tr(H_b).
        samples: B, over all processes and micro-batches.
        gradients: gradients of the loss summed over the samples, from the last probe, for histograms of elements.
            None if the estimator has none.
    """

    traces: Tensor
    samples: int
    gradients: Sequence[Tensor | None] | None = None


def fisher(measured: MeasuredModel, batch: Sequence[Any], *, seed: Sequence[int], probes: int) -> Draws:
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

    Raises:
        ValueError: no label of the batch counts; and the errors of :func:`predict`.
    """
    generators = [np.random.default_rng([*seed, probe]) for probe in range(probes)]
    totals: list[list[Tensor | None] | None] = [None] * probes
    gradients: list[Tensor | None] = []
    traces, samples = [], 0
    for number, micro_batch in enumerate(batch, start=1):
        predictions = measured.predict(micro_batch)
        start, here, everywhere = measured.offset_and_counts(predictions)
        samples += everywhere
        for probe, generator in enumerate(generators):
            # fully_shard allows one backward pass for each forward pass.
            if probe > 0 and measured.parts.sharded:
                predictions = measured.predict(micro_batch)
            labels = sampled_labels(predictions, generator.random(everywhere)[start : start + here])
            more = probe + 1 < probes and not measured.parts.sharded
            summed = add(
                totals[probe], gradients_of_sum(measured, summed_loss(predictions, labels), keep_graph=more)
            )
            totals[probe] = summed
            if number == len(batch):
                totals[probe] = None
                gradients = measured.parts.sum_over_processes(summed)
                traces.append(measured.parts.sums(gradients))
    return Draws(torch.stack(traces) / _nonzero(samples), samples, gradients)


def empirical(measured: MeasuredModel, batch: Sequence[Any]) -> Draws:
    r"""Estimate the trace with the labels of the data, from the gradient that training computes anyway.

        E[B ||g_b||^2] = tr(Cov_b) + B ||E g_b||^2

    It is biased if the mean gradient is not small against its noise, and more so in larger batches. It is also
    biased if the model does not fit the data, because the covariance of the gradients is then not the Fisher matrix.

    Args:
        measured: the model.
        batch: this process's micro-batches. Their gradients are added up.

    Raises:
        ValueError: no label of the batch counts; and the errors of :func:`predict`.
    """
    total, samples = None, 0
    for micro_batch in batch:
        predictions = measured.predict(micro_batch)
        samples += measured.samples(predictions)
        total = add(total, gradients_of_sum(measured, summed_loss(predictions)))
    gradients = measured.parts.sum_over_processes(total or [])
    return Draws(measured.parts.sums(gradients).unsqueeze(0) / _nonzero(samples), samples, gradients)


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


def optimizer(parts: ParameterParts, adam: Optimizer, samples: int) -> Draws:
    r"""Read the estimate from Adam's second moment, for runs that cannot afford a backward pass.

        tr(G_b) ~ B sum_i v_i / (1 - beta2^t)

    This averages `empirical` over the last 1 / (1 - beta2) steps, with the labels of the data and after clipping.
    Clipping reduces the weight of a step equally in all blocks.

    Args:
        parts: the parts of the model's parameters.
        adam: an optimizer with ``exp_avg_sq`` in its state (Adam, AdamW, NAdam ...), after any number of steps.
        samples: B, the number of samples in the mean loss of one step.

    Raises:
        ValueError: a parameter has no second moment: the optimizer is of another kind, has taken no step, or is not of
            this model.
    """
    beta2 = {id(p): group.get("betas", (0, 0))[1] for group in adam.param_groups for p in group["params"]}
    gradients: list[Tensor | None] = []
    for i, parameter in enumerate(parts.parameters):
        state = adam.state.get(parameter, {})
        if "exp_avg_sq" not in state or state["exp_avg_sq"].shape != parameter.shape:
            raise ValueError(
                f"{type(adam).__name__} keeps no second moment (exp_avg_sq) of the model's parameter "
                f"number {i}, {parts.names[i]}; its state has {sorted(state) or 'nothing'}: "
                "expected an Adam-like optimizer of this model that has taken a step"
            )
        moment, unbiased = state["exp_avg_sq"], 1 - beta2[id(parameter)] ** float(state["step"])
        # Treat the root of the moment as one gradient of the summed loss, B times that of the mean loss.
        gradients.append((moment.to(accumulation_dtype(moment)) / unbiased).sqrt() * samples)
    return Draws(parts.sums(gradients).unsqueeze(0) / samples, samples, gradients)


def _hutchinson(
    measured: MeasuredModel,
    batch: Sequence[Any],
    seed: Sequence[int],
    probes: int,
    product: Callable[..., Any],
) -> Draws:
    """Draw from one batch with `product`, a function for Hessian-vector products."""
    traces, samples = [], 0
    with hessian.no_autocast(measured):
        for probe in range(probes):
            signs = [
                hessian.random_signs(parameter, [*seed, probe, i])
                for i, parameter in enumerate(measured.parts.parameters)
            ]
            total, samples = product(measured, batch, signs)
            traces.append(
                measured.parts.sums(measured.parts.sum_over_processes(total), signs) / _nonzero(samples)
            )
    return Draws(torch.stack(traces), samples)


def _nonzero(samples: int) -> int:
    """Return the number of samples; raise ValueError if it is 0."""
    if not samples:
        raise ValueError(NO_LABELS)
    return samples


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "fisher": fisher,
    "empirical": empirical,
    "hutchinson": hutchinson,
    "optimizer": optimizer,
}
