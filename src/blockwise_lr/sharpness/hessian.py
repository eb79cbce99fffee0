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
from blockwise_lr.fp32 import HALF
from blockwise_lr.sharpness.gradient_sums import GradientSum
from blockwise_lr.sharpness.model_gradients import MeasuredModel, stream_gradients
from blockwise_lr.sharpness.predictions import summed_loss

# Relative step of the central difference. The truncation error grows as its square and the rounding error as its
# inverse. They balance at about the cube root of a gradient's precision.
_RELATIVE_STEP = {torch.float32: 1e-3, torch.float64: 1e-5}


class NoDoubleBackwardError(RuntimeError):
    """The model has no double backward pass, or one that would silently omit terms."""


def double_backward(
    measured: MeasuredModel, batch: Sequence[Any], vector: Sequence[Tensor], *, strict: bool
) -> tuple[list[Tensor | None], int]:
    """Return H v of the summed loss over this process's samples, and the number of samples on all processes.

    Args:
        measured: the model.
        batch: this process's micro-batches.
        vector: v, one tensor for each parameter.
        strict: refuse models with autograd functions of their own. If the backward pass of such a function calls a
            kernel, autograd treats its result as a constant, and the Hessian lacks the terms that depend on it.

    Raises:
        NoDoubleBackwardError: such a function with `strict`, or a function marked with @once_differentiable.
    """
    parameters, total, samples = measured.parts.parameters, GradientSum(measured.parts), 0
    for micro_batch in batch:
        # Checkpointed layers run forward again in the backward passes, so these need the same attention kernel.
        with sdpa_kernel(SDPBackend.MATH):
            predictions = measured.predict(micro_batch)
            own = {node.name() for node in _graph([predictions.logits]) if strict and _is_own(node)}
            if own:
                raise NoDoubleBackwardError(
                    f"not known to have a double backward pass: {', '.join(sorted(own))}"
                )
            samples += measured.samples(predictions)
            loss = summed_loss(predictions)
            first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            measured.parts.check_dense(first)
            # once_differentiable ends the graph with a node that raises. No parameter lies beyond this node, so
            # torch.autograd.grad would never reach it, and the products would silently lack terms.
            if any(node.name() == "torch::autograd::Error" for node in _graph(first)):
                raise NoDoubleBackwardError(
                    "the model computes with a function that is marked with @once_differentiable and so has no double "
                    'backward pass: use hvp="finite-differences", or "auto"'
                )
            slope = sum((g * v).sum() for g, v in zip(first, vector) if g is not None)
            products = torch.autograd.grad(slope, parameters, allow_unused=True)  # type: ignore[arg-type]
        total.add(range(len(products)), products)
    return total.tensors, samples


def _graph(tensors: Sequence[Tensor | None]) -> set[Any]:
    """Return all nodes of the autograd graphs that lead to the tensors."""
    seen: set[Any] = set()
    todo: list[Any] = [tensor.grad_fn for tensor in tensors if tensor is not None]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return seen


def _is_own(node: Any) -> bool:
    """Return whether a graph node comes from a torch.autograd.Function written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def step_size(measured: MeasuredModel, batch: Sequence[Any]) -> float:
    """Return the step of the finite differences, equal for every element.

    It is proportional to the root mean square of the parameters, with a factor for the lowest precision in use.

    Raises:
        ValueError: parameters or the forward pass are in half precision.
    """
    kinds = {parameter.dtype for parameter in measured.parts.parameters}
    if kinds & HALF:
        raise ValueError(
            f"finite differences need float32 or float64 parameters, these are {', '.join(map(str, kinds))}: rounding "
            "would drown the curvature; measure model.float(), or another estimator"
        )
    with torch.no_grad():  # many float64 models compute norms and losses in float32
        kinds |= measured.predict(batch[0], needs_gradient=False).kinds
    # Otherwise the outermost module would keep its gathered parameters, which do not follow the step.
    processes.reshard(measured.model)
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
    """Return H v and the number of samples, as :func:`double_backward`, by a central difference of gradients.

        H v ~ (g(w + step v) - g(w - step v)) / (2 step)

    The parameters are restored to the bit.
    """
    parameters = measured.parts.parameters
    kept = [local(parameter.detach()).clone() for parameter in parameters]
    sides: list[list[Tensor | None]] = []
    samples = 0
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, value, direction in zip(parameters, kept, vector):
                    local(parameter).copy_(value + sign * step * local(direction))
            total, samples = GradientSum(measured.parts), 0
            for micro_batch in batch:
                predictions = measured.predict(micro_batch)
                samples += measured.samples(predictions)
                stream_gradients(measured, summed_loss(predictions), total.add)
            sides.append(total.tensors)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                local(parameter).copy_(value)
    differences = [None if a is None or b is None else (a - b) / (2 * step) for a, b in zip(*sides)]
    return differences, samples


def has_no_double_backward(error: RuntimeError) -> bool:
    """Return whether an error means that the model has no double backward pass."""
    text = str(error).lower()
    return isinstance(error, NoDoubleBackwardError) or any(
        reason in text for reason in ("not implemented", "double backward", "does not require grad")
    )


def no_autocast(measured: MeasuredModel) -> Any:
    """Return a context without autocast on the model's device."""
    kind = measured.parts.parameters[0].device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def random_signs(parameter: nn.Parameter, seed: Sequence[int]) -> Tensor:
    """Return +1 and -1 in the parameter's shape, the same on any number of processes."""
    signs = np.random.default_rng(seed).integers(0, 2, parameter.numel(), dtype=np.int8) * 2 - 1
    whole = torch.from_numpy(signs).reshape(parameter.shape).to(parameter.device, parameter.dtype)
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process draws the same numbers, so nothing has to be sent.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]
