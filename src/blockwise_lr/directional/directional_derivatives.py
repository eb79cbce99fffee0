"""Slope and curvature of the loss along given directions: one backward pass, and central differences of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr import distributed as processes
from blockwise_lr.blocks import Block
from blockwise_lr.directional.moved_parameters import MovedParameters
from blockwise_lr.directional.parameter_chunks import Chunk
from blockwise_lr.directional.update_signals import update_signals
from blockwise_lr.sharpness.model_gradients import MeasuredModel
from blockwise_lr.sharpness.predictions import Predictions, check_counts, summed_loss
from blockwise_lr.sharpness.tensor_sums import to_device

# Number of logits, over all blocks, that are processed at a time. On a GPU, fewer would be lost in kernel launches.
_CPU_LOGITS, _GPU_LOGITS = 1 << 22, 1 << 25


@dataclass(frozen=True)
class Direction:
    """The optimizer's update of one block.

    Args:
        block: the block.
        chunks: the chunks that cover the block.
        scale: factor by which the update is added to the parameters in the central differences.
    """

    block: Block
    chunks: tuple[Chunk, ...]
    scale: float


class Draw(NamedTuple):
    """What one batch shows along k directions.

    Args:
        signals: the slope along each direction, (k,).
        curvature: C, (k, k).
        noise: rounding noise in the diagonal of C, (k,).
        samples: number of samples of the batch.
    """

    signals: npt.NDArray[np.float64]
    curvature: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]
    samples: int


def slope_and_curvature(
    measured: MeasuredModel,
    batch: Any,
    predictions: Predictions,
    moved: MovedParameters,
    directions: Sequence[Direction],
    *,
    small: float,
) -> Draw:
    """Measure the slope and the curvature along each direction on one batch, over all processes.

    The parameters are at the start afterwards. The host waits for the device once.

    Args:
        small: size, relative to each direction's scale, of the move that shows the rounding; at most 1.
    """
    blocks = [direction.block for direction in directions]
    signals = update_signals(measured, summed_loss(predictions), moved.updates, blocks)
    center = predictions._replace(logits=predictions.logits.detach())
    rows = center.row_counts()
    changes = []
    for direction in directions:
        above = _logits_at(measured, batch, moved, [direction], 1, center, rows)
        below = _logits_at(measured, batch, moved, [direction], -1, center, rows)
        changes.append(torch.sub(above, below).div_(2 * direction.scale))
        del above, below
    curvature = _gauss_newton_products(center, changes)
    # The effect of a smaller move is known from `changes`. The rest of the change is rounding.
    rest = _logits_at(measured, batch, moved, directions, small, center, rows) - center.logits
    for direction, change in zip(directions, changes):
        rest.sub_(change, alpha=small * direction.scale)
    rounding = _gauss_newton_products(center, [rest]).sum() / 2
    sums = [to_device(tensor.flatten(), signals.device) for tensor in (rows, rounding, signals, curvature)]
    found = torch.cat(sums)
    if measured.parts.distributed:
        dist.all_reduce(found)
    return _draw(found.tolist(), directions)


def _draw(found: Sequence[float], directions: Sequence[Direction]) -> Draw:
    """Return the draw of the sums over all samples.

    Args:
        found: the numbers of :meth:`Predictions.row_counts`, rounding, signals and curvature.
        directions: the directions.

    Raises:
        ValueError: as :func:`check_counts`.
    """
    k, (samples, broken, foreign, rounding), measured = len(directions), found[:4], found[4:]
    check_counts(samples, broken, foreign, may_be_empty=False)
    scales = np.array([direction.scale for direction in directions])
    return Draw(
        signals=np.array(measured[:k]) / samples,
        curvature=np.array(measured[k:]).reshape(k, k) / samples,
        noise=rounding / (2 * scales**2) / samples,
        samples=round(samples),
    )


def _logits_at(
    measured: MeasuredModel,
    batch: Any,
    moved: MovedParameters,
    directions: Sequence[Direction],
    factor: float,
    center: Predictions,
    rows: Tensor,
) -> Tensor:
    """Return the logits after moving the parameters along each direction by a factor of its scale.

    The parameters are moved back afterwards. After an error, the caller restores all of them.

    Args:
        center: the predictions at the start; they tell which rows count.
        rows: (3,) float64; the number of rows that are not finite is added to the second.
    """
    for direction in directions:
        moved.move(direction.chunks, factor * direction.scale)
    with torch.no_grad():
        logits = measured.predict(batch, needs_gradient=False, check_rows=False).logits
    # Without this, the outermost module would keep the gathered, moved parameters.
    processes.reshard(measured.model)
    for direction in directions:
        moved.move(direction.chunks, 0.0)
    rows[1] += center._replace(logits=logits).row_counts()[1]
    return logits


def _gauss_newton_products(at: Predictions, changes: Sequence[Tensor]) -> Tensor:
    """Return the Gauss-Newton products of all pairs of changes, summed over samples: (k, k) float64.

        sum over samples of dz_a' (diag p - p p') dz_b

    p are the predicted probabilities, and dz_a is the change of the logits along direction a.
    """
    k, classes = len(changes), at.logits.shape[1]
    total = torch.zeros(k, k, dtype=torch.float64, device=at.logits.device)
    rows = max(1, (_CPU_LOGITS if at.logits.device.type == "cpu" else _GPU_LOGITS) // (k * classes))
    for start in range(0, len(at.logits), rows):
        chunk = slice(start, start + rows)
        p = at.logits[chunk].double().softmax(-1)
        dz = torch.stack([change[chunk] for change in changes]).double()
        dz -= (p * dz).sum(-1, keepdim=True)
        # Rows that do not count may have logits that are not finite. An index by a mask would wait for the device.
        weighted = dz.mul_(p.sqrt_()).masked_fill_(~at.counted[chunk, None], 0.0).reshape(k, -1)
        total += weighted @ weighted.T
    return total
