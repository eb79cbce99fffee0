"""Slope and curvature of the loss along given directions: one backward pass, and central differences of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr import distributed as processes
from blockwise_lr.blocks import Block
from blockwise_lr.blocks.block import PartSlice
from blockwise_lr.distributed import local
from blockwise_lr.sharpness.model_gradients import MeasuredModel, gradients_of_sum
from blockwise_lr.sharpness.parameter_parts import ParameterParts, cut
from blockwise_lr.sharpness.predictions import Predictions, summed_loss

_CHUNK = 1 << 22  # number of logits, over all blocks, that are processed at a time


@dataclass(frozen=True)
class Direction:
    """The optimizer's update of one block.

    Args:
        block: the block.
        pieces: for each parameter of the block, its index and the part of it that belongs to the block (None: all).
        scale: factor by which the update is added to the parameters in the central differences.
    """

    block: Block
    pieces: tuple[tuple[int, PartSlice | None], ...]
    scale: float


def slope_and_curvature(
    measured: MeasuredModel,
    batch: Any,
    predictions: Predictions,
    updates: Sequence[Tensor],
    directions: Sequence[Direction],
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Measure the slope and the curvature along each direction on one batch.

    Returns:
        The signals (k,), C (k, k) and the rounding noise in the diagonal of C (k,), all float64; and the number of
        samples.
    """
    parts = measured.parts
    gradients = parts.sum_over_processes(gradients_of_sum(measured, summed_loss(predictions)))
    signal = dots(parts, gradients, updates, directions)
    center = predictions._replace(logits=predictions.logits.detach())
    changes = []
    for direction in directions:
        above, below = (
            _logits_at(measured, batch, updates, [(direction, sign * direction.scale)]) for sign in (1, -1)
        )
        changes.append((above - below) / (2 * direction.scale))
    curvature = _gauss_newton_products(center, changes)
    # The effect of a move a thousand times smaller is known from `changes`. The rest of the change is rounding.
    small = 1e-3
    moved = _logits_at(measured, batch, updates, [(d, small * d.scale) for d in directions])
    known = sum(small * d.scale * change for d, change in zip(directions, changes))
    rounding = _gauss_newton_products(center, [moved - center.logits - known])[0, 0] / 2
    noise = torch.stack([rounding / (2 * d.scale**2) for d in directions])
    if parts.distributed:
        for tensor in (curvature, noise):
            total = tensor.to(parts.parameters[0].device)
            dist.all_reduce(total)
            tensor.copy_(total)
    samples = measured.samples(predictions)
    return signal / samples, curvature / samples, noise / samples, samples


def _logits_at(
    measured: MeasuredModel, batch: Any, updates: Sequence[Tensor], moves: Sequence[tuple[Direction, float]]
) -> Tensor:
    """Return the logits after moving the parameters along each direction by a factor. The moves are then undone."""
    parameters = measured.parts.parameters
    touched = sorted({i for direction, _ in moves for i, _ in direction.pieces})
    kept = {i: local(parameters[i].detach()).clone() for i in touched}
    try:
        with torch.no_grad():
            for direction, factor in moves:
                for i, piece in direction.pieces:
                    cut(local(parameters[i].detach()), piece).add_(cut(updates[i], piece), alpha=factor)
            logits = measured.predict(batch, needs_gradient=False).logits
        # Without this, the outermost module would keep the gathered, moved parameters.
        processes.reshard(measured.model)
        return logits
    finally:
        with torch.no_grad():
            for i, value in kept.items():
                local(parameters[i].detach()).copy_(value)


def _gauss_newton_products(at: Predictions, changes: Sequence[Tensor]) -> Tensor:
    """Return the Gauss-Newton products of all pairs of changes, summed over samples: (k, k) float64 on the CPU.

        sum over samples of dz_a' (diag p - p p') dz_b

    p are the predicted probabilities, and dz_a is the change of the logits along direction a.
    """
    k, classes = len(changes), at.logits.shape[1]
    total = torch.zeros(k, k, dtype=torch.float64, device=at.logits.device)
    rows = max(1, _CHUNK // (k * classes))
    for start in range(0, len(at.logits), rows):
        chunk = slice(start, start + rows)
        counted = at.counted[chunk]
        p = at.logits[chunk][counted].double().softmax(-1)
        dz = torch.stack([change[chunk][counted] for change in changes]).double()
        dz -= (p * dz).sum(-1, keepdim=True)
        weighted = (dz * p.sqrt()).reshape(k, -1)
        total += weighted @ weighted.T
    return total.cpu()


def dots(
    parts: ParameterParts,
    tensors: Sequence[Tensor | None],
    updates: Sequence[Tensor],
    directions: Sequence[Direction],
) -> Tensor:
    """Return <tensor, update> along each direction, over all shards: (k,) float64."""
    totals = torch.zeros(len(directions), dtype=torch.float64)
    for row, direction in enumerate(directions):
        for i, piece in direction.pieces:
            if (tensor := tensors[i]) is not None:
                a, b = parts.own(i, tensor, piece), parts.own(i, updates[i], piece)
                totals[row] += (a.double() * b.double()).sum().cpu()
    if parts.sharded:
        everywhere = totals.to(parts.parameters[0].device)
        dist.all_reduce(everywhere)
        totals = everywhere.cpu()
    return totals
