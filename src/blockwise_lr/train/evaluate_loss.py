"""Evaluate a causal language model on a fixed set of windows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from blockwise_lr.distributed import is_tensor_parallel, reshard
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train.compiled_layers import run_eagerly


@torch.no_grad()
@fp32_precision("ieee")
def evaluate_loss(model: nn.Module, windows: Dataset[dict[str, torch.Tensor]], *, batch_size: int) -> float:
    """Return the mean cross-entropy, in nats, over every predicted token of `windows`.

    The model runs uncompiled and in its own precision: without autocast, and in fp32 without TF32, whatever the process
    has set.

    Each batch is weighted by the number of tokens that it predicts, so the batch size changes only rounding. Under
    torch.distributed, each rank evaluates its share of the windows and all ranks return the same number. DDP and
    ``fully_shard`` need equally many forward passes on all ranks, so a rank with fewer batches repeats a window that
    does not count. Under tensor parallelism, every rank evaluates all windows.

    Args:
        model: takes ``input_ids`` and ``labels`` (batch, context) and returns an object with the mean ``loss``.
        windows: items ``{"input_ids": (context,), "labels": (context,)}``.
        batch_size: windows in one forward pass; has no effect on the result.

    Returns:
        The loss, in nats a token.

    Example:
        >>> evaluate_loss(model, FixedWindows(data.val, context=128, max_tokens=0), batch_size=16)  # doctest: +SKIP
        4.1
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if is_tensor_parallel(model, parameters):
        rank, world = 0, 1
    count = len(windows)  # type: ignore[arg-type]
    largest = -(-count // world)
    share = Subset(windows, range(rank, count, world))
    # Batches that this rank has fewer than the others.
    short = -(-largest // batch_size) - -(-len(share) // batch_size)
    uncounted = DataLoader(Subset(windows, [0] * short)) if short else ()
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    try:
        with torch.autocast(device.type, enabled=False), run_eagerly(model):
            for batch in DataLoader(share, batch_size=batch_size) if len(share) else ():
                predicted = (batch["labels"][:, 1:] != -100).sum()
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
                # The sums stay on the device: the host waits for it once, at the end.
                total[0] += loss.double() * predicted
                total[1] += predicted
            for batch in uncounted:
                model(**{name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        model.train(was_training)
        # fully_shard's outermost module keeps unsharded parameters after a forward pass without a backward pass.
        reshard(model)
    if world > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])
