"""Measure the slope and the curvature of the loss along the optimizer's own update, by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr import distributed as processes
from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.directional.directional_derivatives import Direction, Draw, slope_and_curvature
from blockwise_lr.directional.directional_report import DirectionalReport
from blockwise_lr.directional.moved_parameters import MovedParameters, restored_parameters, widened_others
from blockwise_lr.directional.parameter_chunks import Chunk, chunk_elements, chunks
from blockwise_lr.directional.update_hessian import update_hessian
from blockwise_lr.directional.update_signals import squared_lengths
from blockwise_lr.directional.updates import (
    StoredUpdates,
    Updates,
    groups_by_parameter,
    state_updates,
    stepped_updates,
)
from blockwise_lr.distributed import local
from blockwise_lr.fp32 import HALF
from blockwise_lr.sharpness.hessian import no_autocast
from blockwise_lr.sharpness.measure import in_lockstep, measurement_mode, unwrapped
from blockwise_lr.sharpness.model_gradients import MeasuredModel, gradients_of_sum
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.predictions import LossFunction, Predictions, summed_loss

# Default of `move`, by dtype of the forward pass. The rounding error of the central differences grows with the inverse
# of `move`, and the truncation error with its square.
_DEFAULT_MOVES = {torch.float32: 1e-3, torch.float64: 1e-5}
# Size, relative to the default of `move`, of the move that shows the rounding: parameters still change by a few units
# in the last place. A smaller one would leave them as they are, and no rounding would show.
_SMALL_MOVE = 1e-3


def measure_directional(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any] | Mapping[str, Any],
    *,
    max_batches: int | None = None,
    loss_fn: LossFunction | None = None,
    blocks: BlockMap | None = None,
    distributed: bool = False,
    hessian: bool = False,
    move: float | None = None,
    step: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> DirectionalReport:
    r"""Measure the learning rate at which each block would lower the loss most.

    The measurement uses u_b, the update that the optimizer subtracts from block b per unit of learning rate. It
    evaluates the loss on fresh batches, at the parameters before the update. After the update, only the remaining gain
    would be visible. The quantities are:

        s_b  = <g, u_b>               the signal: above 0 if the update lowers the loss
        C_ab = u_a' G u_b             the curvature; G is the Gauss-Newton matrix of the mean loss

    s and C define a local quadratic model of the loss. The report gives the learning rates that minimise it:

        best_lr        = s_b / C_bb                               if all other blocks are fixed
        best_lr_beside = (s_b - sum_{a != b} C_ba lr_a) / C_bb    if the other blocks move at their current rates
        joint_best_lr  = C^-1 s                                   if all learning rates are chosen together

    C needs the change of the logits when a block moves along its update. Central differences give this change: two
    forward passes per block, without second derivatives, so every attention kernel works. s needs one backward pass.
    The computation uses at least float32 and no autocast, because differences in bfloat16 are rounding noise. The model
    and the optimizer are restored exactly, to the bit.

    The measurement holds one copy of the parameters in float32, and the logits of a batch once for each block. Frozen
    parameters and buffers in half precision are copied, too. Updates and gradients exist only chunk by chunk. For
    optimizers other than Adam, AdamW and AdamMini, the update is kept too.

    Args:
        model: as for :func:`blockwise_lr.measure_sharpness`.
        optimizer: the optimizer that trains the model. For Adam, AdamW and AdamMini, the last update is read from the
            state and is undone during the measurement. Its learning rate is taken from the groups; if a schedule has
            stepped since the update, this is the learning rate of the next step. For any other optimizer, the next
            update is observed in one step on the first batch, without gradient clipping. The step is then undone, and
            that batch is not used for the measurement.
        batches: batches that the optimizer has not seen, such as those of the `measure` split.
        max_batches: largest number of batches to measure on. Default: all.
        loss_fn, blocks, distributed, step, on_batch: as for :func:`blockwise_lr.measure_sharpness`.
        hessian: also measure with the true Hessian, by Hessian-vector products. For each block, this needs one more
            forward pass and two more backward passes. Default False.
        move: root mean square of the change of a block's parameters in the central differences. Default 1e-3 if the
            forward pass computes anything in float32 (transformers' RMSNorm does so for every model), 1e-5 in float64.

    Returns:
        A DirectionalReport, with standard errors over batches and the rounding noise in each curvature.

    Raises:
        ValueError: the optimizer belongs to another model or has taken no step; there is no batch; the forward pass
            computes in half precision even with float32 parameters; the model is sharded and has fused weights that
            are not split; hessian=True and the model is sharded or has no double backward pass; or a condition of
            :func:`blockwise_lr.measure_sharpness` is not met.

    Example:
        >>> report = measure_directional(model, optimizer, batches)  # doctest: +SKIP
        >>> report[Block.VO].best_lr / report[Block.VO].lr  # doctest: +SKIP
        0.12
    """
    check_model(model, "measure_directional")
    inner, replicated = unwrapped(model)
    processes.reshard(inner)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # unwrap accelerate's wrapper
    parts = ParameterParts(inner, blocks, distributed=distributed or replicated)
    _check(parts, hessian, move, max_batches)
    groups = groups_by_parameter(optimizer, parts.parameters)
    single_batches = ([batch] for batch in ([batches] if isinstance(batches, Mapping) else batches))
    unseen = (batch for (batch,) in in_lockstep(single_batches, parts))
    draws: list[Draw] = []
    hessians: list[npt.NDArray[np.float64]] = []
    measured = MeasuredModel(inner, parts, loss_fn)
    with (
        measurement_mode(inner),
        widened_others(inner, parts.parameters),
        restored_parameters(parts.parameters) as values,
        no_autocast(measured),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        moved = _moved_parameters(measured, optimizer, groups, values, unseen)
        by_block = _chunks_by_block(parts, moved.updates)
        for chunks_of_block in by_block.values():
            moved.move(chunks_of_block, 0.0)
        lengths = squared_lengths(parts, moved.updates, by_block).tolist()
        directions: list[Direction] = []
        for index, batch in enumerate(islice(unseen, max_batches)):
            predictions = measured.predict(batch, check_rows=False)
            used = move or _default_move(predictions)
            directions = directions or _directions(parts, by_block, lengths, used)
            small = _SMALL_MOVE * max(1.0, _usual_move(predictions) / used)
            draws.append(
                slope_and_curvature(measured, batch, predictions, moved, directions, small=min(small, 1.0))
            )
            if hessian:
                hessians.append(update_hessian(measured, batch, moved, directions) / draws[-1].samples)
            if on_batch is not None:
                on_batch(index + 1)
    if not draws:
        raise ValueError(
            "batches is empty; expected at least one batch (one more if the optimizer is not Adam)"
        )
    return DirectionalReport.from_draws(
        [direction.block for direction in directions],
        signals=np.stack([draw.signals for draw in draws]),
        curvatures=np.stack([draw.curvature for draw in draws]),
        noise=np.stack([draw.noise for draw in draws]),
        samples=[draw.samples for draw in draws],
        hessians=np.stack(hessians) if hessians else None,
        lrs=[_mean_setting(direction, parts, groups, "lr") for direction in directions],
        ratios=[_mean_setting(direction, parts, groups, "lr_ratio") for direction in directions],
        numels=[_block_numel(direction.block, parts) for direction in directions],
        step=step,
    )


def _check(parts: ParameterParts, hessian: bool, move: float | None, max_batches: int | None) -> None:
    """Raise ValueError unless the arguments of measure_directional are valid for this model."""
    if move is not None and not move > 0:
        raise ValueError(f"move is {move}; expected a number above 0")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}; expected 1 or more")
    if parts.tensor_parallel:
        raise ValueError(
            "measure_directional does not support tensor parallelism: measure on one process, or under fully_shard"
        )
    if not parts.sharded:
        return
    if hessian:
        raise ValueError("hessian=True needs whole parameters, and these are sharded: leave it out")
    fused = [name for name, pieces in zip(parts.names, parts.blocks_and_slices()) if len(pieces) > 1]
    if fused:
        raise ValueError(
            f"{fused[0]} is a fused QKV weight of a sharded model: its parts cannot be moved one by one; "
            "call split_fused(model) before fully_shard"
        )


def _default_move(predictions: Predictions) -> float:
    """Return the default of `move` for the least precise dtype of the forward pass."""
    if predictions.kinds & HALF:
        raise ValueError(
            "the forward pass computes in half precision, and not because of the parameters alone (autocast inside the "
            "model, or fully_shard with MixedPrecisionPolicy or half-precision weights): its rounding would drown the "
            "curvature"
        )
    return _usual_move(predictions)


def _usual_move(predictions: Predictions) -> float:
    kinds = predictions.kinds | {predictions.logits.dtype}
    return max(
        (size for kind, size in _DEFAULT_MOVES.items() if kind in kinds),
        default=_DEFAULT_MOVES[torch.float32],
    )


def _moved_parameters(
    measured: MeasuredModel,
    optimizer: Optimizer,
    groups: Sequence[dict[str, Any]],
    values: Sequence[Tensor],
    batches: Iterator[Any],
) -> MovedParameters:
    """Return the parameters with the last update of a readable optimizer, or with the next one of any other."""
    parameters = measured.parts.parameters
    updates = state_updates(optimizer, parameters)
    if updates is None:
        seen = StoredUpdates(_updates_of_a_step(measured, optimizer, values, batches))
        return MovedParameters(parameters, values, seen, None)
    last_step = [
        (
            float(group["lr"]),
            float(group["weight_decay"]) if group.get("decoupled_weight_decay", True) else 0.0,
        )
        for group in groups
    ]
    return MovedParameters(parameters, values, updates, last_step)


def _updates_of_a_step(
    measured: MeasuredModel, optimizer: Optimizer, values: Sequence[Tensor], batches: Iterator[Any]
) -> list[Tensor]:
    """Return the update that the optimizer makes in one step on the first batch."""
    batch = next(batches, None)
    if batch is None:
        raise ValueError("batches is empty; expected two batches or more, the first for the optimizer's step")
    predictions = measured.predict(batch)
    mean_loss = summed_loss(predictions) / measured.samples(predictions)
    return stepped_updates(
        optimizer,
        measured.parts.parameters,
        measured.parts.sum_over_processes(gradients_of_sum(measured, mean_loss)),
        values,
    )


def _chunks_by_block(parts: ParameterParts, updates: Updates) -> dict[Block, list[Chunk]]:
    """Return the chunks of each block, in the order of :class:`Block`."""
    tensors = [local(parameter.detach()) for parameter in parts.parameters]
    found: dict[Block, list[Chunk]] = {}
    for chunk in chunks(parts.blocks_and_slices(), tensors, updates.kinds, chunk_elements(tensors)):
        found.setdefault(chunk.block, []).append(chunk)
    blocks = {part.block for part in parts.parts}  # a process may have no element of a block
    return {block: found.get(block, []) for block in Block if block in blocks}


def _directions(
    parts: ParameterParts, blocks: Mapping[Block, Sequence[Chunk]], lengths: Sequence[float], move: float
) -> list[Direction]:
    """Return the direction of each block that the optimizer moves, scaled to a root mean square of `move`."""
    return [
        Direction(block, tuple(found), move * math.sqrt(_block_numel(block, parts) / length))
        for (block, found), length in zip(blocks.items(), lengths)
        if length > 0  # blocks that the optimizer does not move are left out
    ]


def _mean_setting(
    direction: Direction, parts: ParameterParts, groups: Sequence[dict[str, Any]], key: str
) -> float:
    """Return the mean of a group setting over the parameters of a block."""
    pieces = zip(groups, parts.blocks_and_slices())
    found = [float(group.get(key, 1.0)) for group, each in pieces for b, _ in each if b is direction.block]
    return sum(found) / len(found)


def _block_numel(block: Block, parts: ParameterParts) -> int:
    return sum(part.numel for part in parts.parts if part.block is block)
