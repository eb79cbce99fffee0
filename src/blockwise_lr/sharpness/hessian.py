"""Hessian-vector products, by a double backward pass or by finite differences of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockwise_lr import distributed as processes
from blockwise_lr.distributed import is_sharded, local
from blockwise_lr.sharpness.measured_model import MeasuredModel, gradients_of_sum
from blockwise_lr.sharpness.parameter_parts import add
from blockwise_lr.sharpness.predictions import HALF, summed_loss

# Relative size of the central difference: truncation (its square) and rounding (its inverse) are balanced at about
# the cube root of the precision of a gradient.
_RELATIVE_STEP = {torch.float32: 1e-3, torch.float64: 1e-5}


class NoDoubleBackwardError(RuntimeError):
    """A double backward pass that is missing, or of which parts would be missing without a word."""


def double_backward(
    measured: MeasuredModel, batch: Sequence[Any], vector: Sequence[Tensor], *, strict: bool
) -> tuple[list[Tensor | None], int]:
    """H v of the summed loss, this process's part, and the number of samples.

    Args:
        strict: refuse models with autograd functions of their own. If such a function's backward pass calls a kernel,
            autograd takes the result for a constant, and the Hessian lacks what depends on it.

    Raises:
        NoDoubleBackwardError: for these, and for functions that say themselves that they have none.
    """
    parameters, total, samples = measured.parts.parameters, None, 0
    for micro_batch in batch:
        with sdpa_kernel(SDPBackend.MATH):
            predictions = measured.predict(micro_batch)
        if strict and (own := {node.name() for node in _graph([predictions.logits]) if _is_own(node)}):
            raise NoDoubleBackwardError(f"not known to have a double backward pass: {', '.join(sorted(own))}")
        samples += measured.samples(predictions)
        loss = summed_loss(predictions)
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        measured.parts.check_dense(first)
        # once_differentiable puts a node that raises where the graph goes on; but no parameter lies beyond it, so
        # torch.autograd.grad never comes there.
        if any(node.name() == "torch::autograd::Error" for node in _graph(first)):
            raise NoDoubleBackwardError(
                "the model computes with a function that is marked with @once_differentiable and so has no double "
                'backward pass: use hvp="finite-differences", or "auto"'
            )
        slope = sum((g * v).sum() for g, v in zip(first, vector) if g is not None)
        products = torch.autograd.grad(slope, parameters, allow_unused=True)  # type: ignore[arg-type]
        total = add(total, products)
    return total or [], samples


def _graph(tensors: Sequence[Tensor | None]) -> set[Any]:
    """All nodes of the graphs that lead to the tensors."""
    seen: set[Any] = set()
    todo: list[Any] = [tensor.grad_fn for tensor in tensors if tensor is not None]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return seen


def _is_own(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def step_size(measured: MeasuredModel, batch: Sequence[Any]) -> float:
    """How far to move every element: in proportion to the parameters' root mean square and to what is rounded most."""
    kinds = {parameter.dtype for parameter in measured.parts.parameters}
    if kinds & HALF:
        raise ValueError(
            f"finite differences need float32 or float64 parameters, these are {', '.join(map(str, kinds))}: rounding "
            "would drown the curvature; measure model.float(), or another estimator"
        )
    with torch.no_grad():  # many models of float64 have norms and losses in float32
        kinds |= measured.predict(batch[0], needs_gradient=False).kinds
    processes.reshard(measured.model)  # or the outermost module would go on with the parameters of now
    if kinds & HALF:
        raise ValueError(
            "finite differences need float32 or float64, but the forward pass computes in half precision (autocast "
            "inside the model, or fully_shard's MixedPrecisionPolicy): rounding would drown the curvature"
        )
    relative = max(size for kind, size in _RELATIVE_STEP.items() if kind in kinds)
    numel = sum(part.numel for part in measured.parts.parts)
    squares = measured.parts.sums([parameter.detach() for parameter in measured.parts.parameters])
    return relative * float((squares.sum() / numel).sqrt())


def finite_difference(
    measured: MeasuredModel, batch: Sequence[Any], vector: Sequence[Tensor], step: float
) -> tuple[list[Tensor | None], int]:
    """The same from (g(w + step v) - g(w - step v)) / (2 step); the parameters are put back to the bit."""
    parameters = measured.parts.parameters
    kept = [local(parameter.detach()).clone() for parameter in parameters]
    sides: list[list[Tensor | None]] = []
    samples = 0
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, value, direction in zip(parameters, kept, vector):
                    local(parameter).copy_(value + sign * step * local(direction))
            total, samples = None, 0
            for micro_batch in batch:
                predictions = measured.predict(micro_batch)
                samples += measured.samples(predictions)
                total = add(total, gradients_of_sum(measured, summed_loss(predictions)))
            sides.append(total or [])
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                local(parameter).copy_(value)
    differences = [None if a is None or b is None else (a - b) / (2 * step) for a, b in zip(*sides)]
    return differences, samples


def has_no_double_backward(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, NoDoubleBackwardError) or any(
        reason in text for reason in ("not implemented", "double backward", "does not require grad")
    )


def no_autocast(measured: MeasuredModel) -> Any:
    kind = measured.parts.parameters[0].device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def random_signs(parameter: nn.Parameter, seed: Sequence[int]) -> Tensor:
    """+1 and -1 of the parameter's shape, the same on any number of processes."""
    signs = np.random.default_rng(seed).integers(0, 2, parameter.numel(), dtype=np.int8) * 2 - 1
    whole = torch.from_numpy(signs).reshape(parameter.shape).to(parameter.device, parameter.dtype)
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process has the same numbers: nothing needs to be sent.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]
