"""Estimators of the trace of each part's curvature: one function each, one draw a call.

Every estimator returns, for each part b, an estimate of tr(H restricted to b), with H the Hessian or Gauss-Newton
matrix of the mean loss over B samples; the sharpness is this divided by #(b) (METHOD section 2). Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from blockwise_lr.sharpness.parts import Parts, add, is_sharded, local
from blockwise_lr.sharpness.predictions import (
    LossFunction,
    Predictions,
    predict,
    sampled_labels,
    summed_loss,
)

HessianProducts = Literal["auto", "double-backward", "finite-differences"]

# Relative size of the central difference: truncation (its square) and rounding (its inverse) are balanced at about
# the cube root of the precision of a gradient.
_RELATIVE_STEP = {torch.float32: 3e-3, torch.float64: 1e-5}


@dataclass(frozen=True)
class Problem:
    """What is measured: a model in eval mode, its parts, and how it computes its loss.

    Args:
        model: unwrapped, in eval mode.
        parts: its parameters in parts.
        loss_fn: as in :func:`predict`.
    """

    model: nn.Module
    parts: Parts
    loss_fn: LossFunction | None = None

    def predict(self, batch: Any) -> Predictions:
        return predict(self.model, batch, self.loss_fn)


@dataclass(frozen=True)
class Draws:
    """What one batch gives.

    Args:
        traces: (probes, parts) float64, estimates of tr(H_b).
        samples: B, over all processes and micro-batches.
        gradients: the last probe's gradients, for per-element histograms; None where there are none.
    """

    traces: Tensor
    samples: int
    gradients: Sequence[Tensor | None] | None = None


def fisher(problem: Problem, batch: Sequence[Any], *, seed: Sequence[int], probes: int) -> Draws:
    r"""Gauss-Newton trace from labels sampled from the model's own softmax.

        tr(G_b) = E_y~softmax  B ||grad_b Lhat_B(y)||^2

    Unbiased for the Gauss-Newton matrix of a cross-entropy, which is its Fisher information: gradients of different
    samples are independent with mean 0, so their cross terms vanish (METHOD section 2; the Gauss-Newton-Bartlett
    estimator of Sophia, arXiv 2305.14342). Each sample's label depends on the seed and its index in the global batch
    only, so any number of processes or micro-batches draws the same.

    Args:
        problem: the model.
        batch: micro-batches whose gradients are added up; this process's share of them.
        seed: numbers that make this batch's random numbers its own.
        probes: label draws for the same batch; a forward pass for all, a backward pass each.
    """
    generators = [np.random.default_rng([*seed, probe]) for probe in range(probes)]
    totals: list[list[Tensor | None] | None] = [None] * probes
    samples = 0
    for micro_batch in batch:
        predictions = None
        for probe, generator in enumerate(generators):
            if predictions is None or problem.parts.sharded:  # fully_shard runs backward once a forward
                predictions = problem.predict(micro_batch)
            labels = sampled_labels(predictions, _uniforms(problem, generator, len(predictions.counted)))
            more = probe + 1 < probes and not problem.parts.sharded
            totals[probe] = add(
                totals[probe], _gradients(problem, summed_loss(predictions, labels), keep_graph=more)
            )
        samples += _over_processes(problem, predictions.samples if predictions else 0)
    gradients = [problem.parts.sum_over_processes(total) for total in totals if total is not None]
    traces = torch.stack([problem.parts.sums(each) / samples for each in gradients])
    return Draws(traces, samples, gradients[-1])


def empirical(problem: Problem, batch: Sequence[Any]) -> Draws:
    r"""The same with the data's labels: the gradient that training has anyway.

        E[B ||g_b||^2] = tr(Cov_b) + B ||E g_b||^2

    Biased where the mean gradient is not small against its noise, the more the larger the batch, and where the
    model does not fit the data (the covariance of the gradients is then not the Fisher matrix).
    """
    total, samples = None, 0
    for micro_batch in batch:
        predictions = problem.predict(micro_batch)
        total = add(total, _gradients(problem, summed_loss(predictions)))
        samples += _over_processes(problem, predictions.samples)
    gradients = problem.parts.sum_over_processes(total or [])
    return Draws(problem.parts.sums(gradients).unsqueeze(0) / samples, samples, gradients)


def hutchinson(
    problem: Problem, batch: Sequence[Any], *, seed: Sequence[int], probes: int, products: HessianProducts
) -> tuple[Draws, str]:
    r"""Traces of the true Hessian's blocks from Hessian-vector products with random signs.

        tr(H_b) = E_v  v_b' (H v)_b        v_i = +-1                                              (Hutchinson 1990)

    One product serves all blocks: what couples two of them has mean 0. Autocast is off.

    Args:
        problem, batch, seed, probes: as in :func:`fisher`; the signs depend on the seed and the parameter only.
        products: "double-backward" needs an attention kernel that can be differentiated twice (torch's math kernel
            is chosen); "finite-differences" of gradients needs float32 or float64 parameters; "auto" takes the
            second where the first is not to be had.

    Returns:
        The draws, and how the products were computed.

    Raises:
        ValueError: finite differences of half-precision parameters, whose rounding would drown the curvature; or a
            double backward pass of sharded parameters, which fully_shard does not have.
    """
    if products == "double-backward" and problem.parts.sharded:
        raise ValueError(
            "parameters that are sharded (DTensors) have no double backward pass: "
            'use hvp="finite-differences", or "auto"'
        )
    if products == "auto":
        products = "finite-differences" if problem.parts.sharded else "double-backward"
        try:
            return hutchinson(problem, batch, seed=seed, probes=probes, products=products)
        except RuntimeError as error:
            if products == "finite-differences" or not _has_no_double_backward(error):
                raise
        return hutchinson(problem, batch, seed=seed, probes=probes, products="finite-differences")
    product = _double_backward if products == "double-backward" else _finite_difference
    traces, samples = [], 0
    with _no_autocast(problem):
        for probe in range(probes):
            signs = [
                _random_signs(parameter, [*seed, probe, i])
                for i, parameter in enumerate(problem.parts.parameters)
            ]
            total, samples = product(problem, batch, signs)
            traces.append(problem.parts.sums(problem.parts.sum_over_processes(total), signs) / samples)
    return Draws(torch.stack(traces), samples), products


def optimizer(parts: Parts, adam: Optimizer, samples: int) -> Draws:
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
    moments: list[Tensor] = []
    for i, parameter in enumerate(parts.parameters):
        state = adam.state.get(parameter, {})
        if "exp_avg_sq" not in state or state["exp_avg_sq"].shape != parameter.shape:
            raise ValueError(
                f"{type(adam).__name__} keeps no second moment (exp_avg_sq) of the model's parameter "
                f"number {i}, {parts.parts[i].name}; its state has {sorted(state) or 'nothing'}: "
                "expected an Adam-like optimizer of this model that has taken a step"
            )
        step = float(state["step"])
        moments.append(state["exp_avg_sq"] / (1 - beta2[id(parameter)] ** step))
    roots = [moment.sqrt() for moment in moments]
    return Draws(parts.sums(roots).unsqueeze(0) * samples, samples, roots)


# Gradients
# ---------------------------------------------------------------------------------------------------------------


def _gradients(problem: Problem, loss: Tensor, *, keep_graph: bool = False) -> list[Tensor | None]:
    """Gradients of the sum over this process's samples; of sharded parameters, over all processes' samples."""
    parameters = problem.parts.parameters
    if not problem.parts.sharded:
        return list(torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True))
    # fully_shard's reduce-scatter runs in backward() only, into .grad, and averages over the processes.
    with _set_aside(parameters):
        (loss * dist.get_world_size()).backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in parameters]


@contextmanager
def _set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, kept):
            parameter.grad = gradient


def _double_backward(
    problem: Problem, batch: Sequence[Any], vector: Sequence[Tensor]
) -> tuple[list[Tensor | None], int]:
    """H v of the summed loss, this process's part, and the number of samples."""
    parameters, total, samples = problem.parts.parameters, None, 0
    for micro_batch in batch:
        with sdpa_kernel(SDPBackend.MATH):
            predictions = problem.predict(micro_batch)
        samples += _over_processes(problem, predictions.samples)
        loss = summed_loss(predictions)
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        slope = sum((g * v).sum() for g, v in zip(first, vector) if g is not None)
        products = torch.autograd.grad(slope, parameters, allow_unused=True)  # type: ignore[arg-type]
        total = add(total, products)
    return total or [], samples


def _finite_difference(
    problem: Problem, batch: Sequence[Any], vector: Sequence[Tensor]
) -> tuple[list[Tensor | None], int]:
    """The same from (g(w + e v) - g(w - e v)) / 2e; the parameters are put back to the bit."""
    parameters = problem.parts.parameters
    kinds = {parameter.dtype for parameter in parameters}
    if not kinds <= set(_RELATIVE_STEP):
        raise ValueError(
            f"finite differences need float32 or float64 parameters, these are {', '.join(map(str, kinds))}: rounding "
            "would drown the curvature; measure model.float(), or another estimator"
        )
    kept = [local(parameter.detach()).clone() for parameter in parameters]
    step = _RELATIVE_STEP[max(kinds, key=lambda kind: kind.itemsize)] * _root_mean_square(problem.parts)
    sides: list[list[Tensor | None]] = []
    samples = 0
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, value, direction in zip(parameters, kept, vector):
                    local(parameter).copy_(value + sign * step * local(direction))
            total, samples = None, 0
            for micro_batch in batch:
                predictions = problem.predict(micro_batch)
                samples += _over_processes(problem, predictions.samples)
                total = add(total, _gradients(problem, summed_loss(predictions)))
            sides.append(total or [])
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                local(parameter).copy_(value)
    differences = [None if a is None or b is None else (a - b) / (2 * step) for a, b in zip(*sides)]
    return differences, samples


def _root_mean_square(parts: Parts) -> float:
    numel = sum(part.numel for part in parts.parts)
    return float((parts.sums([p.detach() for p in parts.parameters]).sum() / numel).sqrt())


def _has_no_double_backward(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "not implemented" in text or "double backward" in text or "does not require grad" in text


def _no_autocast(problem: Problem) -> Any:
    kind = problem.parts.parameters[0].device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


# Random numbers, the same on any number of processes
# ---------------------------------------------------------------------------------------------------------------


def _uniforms(problem: Problem, generator: np.random.Generator, rows: int) -> Any:
    """The next numbers of one stream for all processes: this one's share, in the order of ranks."""
    if not problem.parts.distributed:
        return generator.random(rows)
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, rows)
    start = sum(counts[: dist.get_rank()])
    return generator.random(sum(counts))[start : start + rows]


def _random_signs(parameter: nn.Parameter, seed: Sequence[int]) -> Tensor:
    signs = np.random.default_rng(seed).integers(0, 2, parameter.numel(), dtype=np.int8) * 2 - 1
    whole = torch.from_numpy(signs).reshape(parameter.shape).to(parameter.device, parameter.dtype)
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process has the same numbers: nothing needs to be sent.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _over_processes(problem: Problem, count: int) -> int:
    if not problem.parts.distributed:
        return count
    total = torch.tensor(count, device=problem.parts.parameters[0].device)
    dist.all_reduce(total)
    return int(total)


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "fisher": fisher,
    "empirical": empirical,
    "hutchinson": hutchinson,
    "optimizer": optimizer,
}
