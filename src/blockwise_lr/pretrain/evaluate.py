"""The loss of a causal language model on a fixed set of windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset


@torch.no_grad()
def evaluate_loss(model: nn.Module, windows: Dataset[dict[str, torch.Tensor]], *, batch_size: int) -> float:
    """Mean cross-entropy in nats over every predicted token of `windows`, in the model's own precision (no autocast).

    Token-weighted: each batch counts by the tokens it predicts, so the batch size changes nothing but the last bits.
    Under torch.distributed each process takes its share of the windows and all return the same number.

    Args:
        model: takes ``input_ids`` and ``labels`` (batch, context) and returns an object with the mean ``loss``.
        windows: items ``{"input_ids": (context,), "labels": (context,)}``.
        batch_size: windows a forward pass; no effect on the result.

    Example:
        >>> evaluate_loss(model, FixedWindows(data.val, context=128, max_tokens=0), batch_size=16)  # doctest: +SKIP
        4.1
    """
    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = Subset(windows, range(rank, len(windows), world))  # type: ignore[arg-type]
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    try:
        for batch in DataLoader(share, batch_size=batch_size):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            predicted = int((batch["labels"][:, 1:] != -100).sum())
            total += torch.tensor(
                [model(**batch).loss.item() * predicted, predicted], dtype=torch.float64, device=device
            )
    finally:
        model.train(was_training)
    if world > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


def evaluate_run(path: Path, *, device: str = "cpu") -> dict[str, Any]:
    """Losses of a checkpoint on the run's fixed validation and tune windows, in fp32.

    Args:
        path: a run's folder (its newest whole checkpoint is taken) or one of its checkpoint-* folders.
        device: where to evaluate.

    Returns:
        ``{"checkpoint", "step", "val_loss", "tune_loss"}``; val_loss is the one in metrics.jsonl at that step.

    Raises:
        UserError: no whole checkpoint, no config.json of a run beside it, or the text has changed or is not to be had.
    """
    from transformers import AutoModelForCausalLM

    from blockwise_lr.pretrain.checkpoint import checkpoint_step, find_checkpoint
    from blockwise_lr.pretrain.data import FixedWindows, prepare_data
    from blockwise_lr.pretrain.folder import check_same_text, read_run_config

    checkpoint = find_checkpoint(path)
    config = read_run_config(checkpoint.parent)
    data = prepare_data(config.data, vocab_size=config.model.vocab_size, context=config.model.context)
    check_same_text(checkpoint.parent, data.describe())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    nn.Module.to(model, device)
    losses = {
        f"{name}_loss": evaluate_loss(
            model, FixedWindows(split, config.model.context, config.eval_tokens), batch_size=config.batch_size
        )
        for name, split in (("val", data.val), ("tune", data.tune))
    }
    return {"checkpoint": str(checkpoint), "step": checkpoint_step(checkpoint), **losses}
