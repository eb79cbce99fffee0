"""The loss of a causal language model: on a fixed set of windows, and of a saved one on its own or any text."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from blockwise_lr.errors import UserError
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.pretrain.config import DataConfig
from blockwise_lr.pretrain.data import FixedWindows, prepare_data
from blockwise_lr.pretrain.folder import check_same_text, read_run_config
from blockwise_lr.pretrain.quiet import quiet_libraries
from blockwise_lr.pretrain.saved import encoder_of, find_model, first_token, tokenizer_of
from blockwise_lr.pretrain.sources import open_source
from blockwise_lr.pretrain.subjects import Subject
from blockwise_lr.pretrain.text_loss import text_loss, token_bytes
from blockwise_lr.sharpness.processes import is_tensor_parallel, reshard


@torch.no_grad()
@fp32_precision("ieee")
def evaluate_loss(model: nn.Module, windows: Dataset[dict[str, torch.Tensor]], *, batch_size: int) -> float:
    """Mean cross-entropy in nats over every predicted token of `windows`, in the model's own precision.

    That is without autocast, and in fp32 without TF32, whatever the process has set.

    Token-weighted: each batch counts by the tokens it predicts, so the batch size changes nothing but the last bits.
    Under torch.distributed each process takes its share of the windows and all return the same number. A process with
    fewer batches than another repeats a window that does not count, so that all make as many forward passes, which
    DDP and ``fully_shard`` need. Under tensor parallelism every process takes all windows.

    Args:
        model: takes ``input_ids`` and ``labels`` (batch, context) and returns an object with the mean ``loss``.
        windows: items ``{"input_ids": (context,), "labels": (context,)}``.
        batch_size: windows a forward pass; no effect on the result.

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
    short = -(-largest // batch_size) - -(-len(share) // batch_size)  # batches that this process lacks
    uncounted = DataLoader(Subset(windows, [0] * short)) if short else ()
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    try:
        for batch in DataLoader(share, batch_size=batch_size) if len(share) else ():
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            predicted = int((batch["labels"][:, 1:] != -100).sum())
            total += torch.tensor(
                [model(**batch).loss.item() * predicted, predicted], dtype=torch.float64, device=device
            )
        for batch in uncounted:
            model(**{name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        model.train(was_training)
        reshard(
            model
        )  # the outermost module holds whole parameters after a forward pass without a backward pass
    if world > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


@quiet_libraries()
@fp32_precision("ieee")
def evaluate_run(
    path: Path,
    *,
    data: DataConfig | None = None,
    tokenizer: str | None = None,
    context: int | None = None,
    overlap: int = 0,
    batch_size: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Losses of a run's newest checkpoint, of one checkpoint, or of a plain Hugging Face folder, in fp32.

    Without `data`, on the run's fixed validation and tune windows: val_loss is the one in metrics.jsonl at that step.
    These windows run across documents: all tokens but the first of each window are predicted, the end-of-text tokens
    among them, and the bytes are those that the predicted tokens stand for (an end-of-text token: none).

    With `data`, on all documents of that text, each from its own beginning: see :func:`text_loss`.

    Args:
        path: folder of a run (its newest whole checkpoint is taken), of a checkpoint or of a Hugging Face model.
        data: any text, as for training (its field `tokenizer` is not looked at).
        tokenizer: id or folder of a Hugging Face tokenizer; None: the model's own. Only with `data`.
        context: tokens that the model reads at once; None: those it was trained with, or its longest up to 2048.
            Only with `data`.
        overlap: tokens that a window reads again before those that it predicts. Only with `data`.
        batch_size: windows a forward pass; None: the run's, otherwise 4.
        device: where to evaluate.

    Returns:
        ``{"checkpoint", "step"}`` and ``{"val_loss", "val_bits_per_byte", "tune_loss", "tune_bits_per_byte"}`` (bits
        are None where a token alone does not tell its bytes: a tokenizer that is not byte-level, or none), or
        ``{"data", "documents", "tokens", "bytes", "context", "overlap", "loss", "bits_per_byte"}``.

    Raises:
        UserError: no whole checkpoint, no causal model, no tokenizer, no run where the text is its own, text that has
            changed or is not to be had, a setting out of range.
    """
    subject, checkpoint, step = find_model(path)
    if data is None and subject.run is None:
        raise UserError(
            f"{path} is a model, not a run with a text of its own: name the text, --data PATH-or-id"
        )
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; expected 1 or more")
    windows = subject.batch_size if batch_size is None else batch_size
    about = {"checkpoint": str(checkpoint), "step": step}
    if data is None:
        if context is not None or overlap or tokenizer:
            raise UserError(
                "--context, --overlap and --tokenizer are for --data; a run's own windows are fixed"
            )
        losses = _own_losses(subject, windows, device)
        _check_finite(losses["val_loss"] + losses["tune_loss"], path)
        return about | losses
    longest = subject.longest
    context = (subject.context if subject.run else min(longest or 2048, 2048)) if context is None else context
    if context < 1 or (longest is not None and context > longest):
        raise UserError(
            f"--context is {context}; {subject.name} takes 1 to {longest or 'any number of'} tokens"
        )
    source = open_source(data)
    own = tokenizer_of(subject, checkpoint, tokenizer)
    model = nn.Module.to(subject.models[-1][1](), device)
    found = text_loss(
        model,
        encoder_of(own),
        source.documents(),
        first=first_token(subject, own),
        context=context,
        overlap=overlap,
        batch_size=windows,
    )
    _check_finite(found.nats, path)
    return about | {
        "data": source.name,
        **asdict(found),
        "context": context,
        "overlap": overlap,
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
    }


def _check_finite(loss: float, path: Path) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of {path} is not finite (NaN or inf): the model diverged or is damaged; choose another"
        )


def _own_losses(subject: Subject, batch_size: int, device: str) -> dict[str, Any]:
    """Loss and bits per byte on the fixed windows of a run's val and tune."""
    assert subject.run is not None
    config = read_run_config(subject.run)
    data = prepare_data(
        config.data,
        vocab_size=config.model.vocab_size,
        context=config.model.context,
        progress=sys.stderr.isatty(),
    )
    check_same_text(subject.run, data.describe())
    model = nn.Module.to(subject.models[-1][1](), device)
    lengths = None if data.tokenizer is None else token_bytes(data.tokenizer)
    found: dict[str, Any] = {}
    for name, split in (("val", data.val), ("tune", data.tune)):
        windows = FixedWindows(split, config.model.context, config.eval_tokens)
        found[f"{name}_loss"] = loss = evaluate_loss(model, windows, batch_size=batch_size)
        found[f"{name}_bits_per_byte"] = None
        if lengths is not None:
            predicted = len(windows) * (config.model.context - 1)
            n_bytes = sum(int(lengths[windows[i]["labels"][1:].numpy()].sum()) for i in range(len(windows)))
            found[f"{name}_bits_per_byte"] = loss * predicted / math.log(2) / n_bytes
    return found
