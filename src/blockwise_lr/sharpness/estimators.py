"""Estimators of the trace of each part's curvature: one function each, one draw a call.

Every estimator returns, for each part b, an estimate of tr(H restricted to b), with H the Hessian or Gauss-Newton
matrix of the mean loss over B samples; the sharpness is this divided by #(b) (METHOD section 2). Sums are float64.
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
from blockwise_lr.sharpness.measured_model import MeasuredModel, gradients_of_sum
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
    """What one batch gives.

    Args:
        traces: (probes, parts) float64, estimates of tr(H_b).
        samples: B, over all processes and micro-batches.
        gradients: the last probe's, of the loss summed over the samples, for per-element histograms; None where there
            are none.
    """

    traces: Tensor
    samples: int
    gradients: Sequence[Tensor | None] | None = None


def fisher(measured: MeasuredModel, batch: Sequence[Any], *, seed: Sequence[int], probes: int) -> Draws:
    r"""Gauss-Newton trace from labels sampled from the model's own softmax.

        tr(G_b) = E_y~softmax  B ||grad_b Lhat_B(y)||^2

    Unbiased for the Gauss-Newton matrix of a cross-entropy, which is its Fisher information: gradients of different
    samples are independent with mean 0, so their cross terms vanish (METHOD section 2; the Gauss-Newton-Bartlett
    estimator of Sophia, arXiv 2305.14342). Each sample's label depends on the seed and on how many samples come before
    it in the global batch, so neither padding nor the number of processes or micro-batches matters.

    Args:
        measured: the model.
        batch: micro-batches whose gradients are added up; this process's share of them.
        seed: numbers that make this batch's random numbers its own.
        probes: label draws for the same batch; a forward pass for all, a backward pass each. With several
            micro-batches, the gradients of all probes are kept until the last of them.

    Raises:
        ValueError: no label of the batch counts; and as :func:`predict`.
    """
    generators = [np.random.default_rng([*seed, probe]) for probe in range(probes)]
    totals: list[list[Tensor | None] | None] = [None] * probes
    gradients: list[Tensor | None] = []
    traces, samples = [], 0
    for number, micro_batch in enumerate(batch, start=1):
        predictions = measured.predict(micro_batch)
        start, here, everywhere = measured.place(predictions)
        samples += everywhere
        for probe, generator in enumerate(generators):
            if probe > 0 and measured.parts.sharded:  # fully_shard runs backward once a forward
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
    return Draws(torch.stack(traces) / _some(samples), samples, gradients)


def empirical(measured: MeasuredModel, batch: Sequence[Any]) -> Draws:
    r"""The same with the data's labels: the gradient that training has anyway.

        E[B ||g_b||^2] = tr(Cov_b) + B ||E g_b||^2

    Biased where the mean gradient is not small against its noise, the more the larger the batch, and where the
    model does not fit the data (the covariance of the gradients is then not the Fisher matrix).

    Raises:
        ValueError: no label of the batch counts; and as :func:`predict`.
    """
    total, samples = None, 0
    for micro_batch in batch:
        predictions = measured.predict(micro_batch)
        samples += measured.samples(predictions)
        total = add(total, gradients_of_sum(measured, summed_loss(predictions)))
    gradients = measured.parts.sum_over_processes(total or [])
    return Draws(measured.parts.sums(gradients).unsqueeze(0) / _some(samples), samples, gradients)


def hutchinson(
    measured: MeasuredModel,
    batch: Sequence[Any],
    *,
    seed: Sequence[int],
    probes: int,
    products: HessianProducts,
) -> tuple[Draws, str]:
    r"""Traces of the true Hessian's blocks from Hessian-vector products with random signs.

        tr(H_b) = E_v  v_b' (H v)_b        v_i = +-1                                              (Hutchinson 1990)

    One product serves all blocks: what couples two of them has mean 0. Autocast is off.

    Args:
        measured, batch, seed, probes: as in :func:`fisher`; the signs depend on the seed and the parameter only.
        products: "double-backward" needs an attention kernel that can be differentiated twice (torch's math kernel
            is chosen); "finite-differences" of gradients needs float32 or float64 throughout, and is good to about
            1e-3 of a block in float32, to 1e-7 where the model casts nothing below float64; "auto" takes the
            second where the first is not to be had, or not to be relied on (autograd functions of the model's own).

    Returns:
        The draws, and how the products were computed.

    Raises:
        ValueError: finite differences in half precision, whose rounding would drown the curvature; a double backward
            pass of sharded parameters, which fully_shard does not have; no label of the batch counts; and as
            :func:`predict`.
        RuntimeError: "double-backward" of a model that has none.
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
    r"""Read off Adam's second moment, for runs that cannot spare a backward pass.

        tr(G_b) ~ B sum_i v_i / (1 - beta2^t)

    An average of `empirical` over the last 1 / (1 - beta2) steps, with the data's labels and after clipping: clipped
    steps count for less, all blocks alike.

    Args:
        parts: the model's.
        adam: an optimizer with ``exp_avg_sq`` in its state (Adam, AdamW, NAdam ...), as deep into training as wanted.
        samples: B, the samples whose mean loss one step's gradient is of.

    Raises:
        ValueError: a parameter has no second moment: another optimizer, no step taken yet, or not the model's.
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
        # As if it were one gradient of the summed loss, B times the mean's.
        gradients.append((moment.to(accumulation_dtype(moment)) / unbiased).sqrt() * samples)
    return Draws(parts.sums(gradients).unsqueeze(0) / samples, samples, gradients)


def _hutchinson(
    measured: MeasuredModel,
    batch: Sequence[Any],
    seed: Sequence[int],
    probes: int,
    product: Callable[..., Any],
) -> Draws:
    traces, samples = [], 0
    with hessian.no_autocast(measured):
        for probe in range(probes):
            signs = [
                hessian.random_signs(parameter, [*seed, probe, i])
                for i, parameter in enumerate(measured.parts.parameters)
            ]
            total, samples = product(measured, batch, signs)
            traces.append(
                measured.parts.sums(measured.parts.sum_over_processes(total), signs) / _some(samples)
            )
    return Draws(torch.stack(traces), samples)


def _some(samples: int) -> int:
    if not samples:
        raise ValueError(NO_LABELS)
    return samples


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "fisher": fisher,
    "empirical": empirical,
    "hutchinson": hutchinson,
    "optimizer": optimizer,
}
