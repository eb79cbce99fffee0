"""Evaluate the loss of a saved model, on the text of its run or on any other text."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from blockwise_lr.analysis.named_models import NamedModel
from blockwise_lr.analysis.saved_models import encoder_of, find_model, first_token, tokenizer_of
from blockwise_lr.analysis.text_loss import text_loss, token_bytes
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import FixedWindows, prepare_data
from blockwise_lr.data.sources import open_source
from blockwise_lr.errors import UserError
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train.build_model import LARGEST
from blockwise_lr.train.evaluate_loss import evaluate_loss
from blockwise_lr.train.quiet import quiet_libraries
from blockwise_lr.train.run_folder import check_same_text, read_run_config


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
    """Evaluate a run's newest checkpoint, one checkpoint, or a plain Hugging Face folder, in fp32.

    Without `data`, the losses are on the run's fixed validation and tune windows; val_loss equals the value in
    metrics.jsonl at that step. These windows cross document boundaries. Every token of a window except the first is
    predicted, including end-of-text tokens. The bytes are those of the predicted tokens; an end-of-text token has none.

    With `data`, the loss is on all documents of that text, each from its beginning; see :func:`text_loss`.

    Args:
        path: folder of a run (its newest complete checkpoint is evaluated), of a checkpoint or of a Hugging Face model.
        data: any text, as for training. Its field `tokenizer` is ignored.
        tokenizer: id or folder of a Hugging Face tokenizer. Default: the model's own. Only with `data`.
        context: number of tokens that the model reads at once. Default: the training context, or the model's longest
            up to 2048. Only with `data`.
        overlap: number of tokens that a window reads again before those that it predicts. Only with `data`.
        batch_size: windows per forward pass. Default: the batch size of the run, otherwise 4.
        device: the device to evaluate on.

    Returns:
        ``{"checkpoint", "step"}`` and ``{"val_loss", "val_bits_per_byte", "tune_loss", "tune_bits_per_byte"}``
        without `data`, or ``{"data", "documents", "tokens", "bytes", "context", "overlap", "loss", "bits_per_byte"}``
        with it. Losses are in nats per token. Without `data`, the bits per byte are None if the tokenizer is missing or
        not byte-level, since the bytes of a single token are then unknown.

    Raises:
        UserError: `path` holds no complete checkpoint or no causal model, or is no run while `data` is None; the
            tokenizer is missing; the text has changed or cannot be read; or a setting is out of range.
    """
    named, checkpoint, step = find_model(path)
    if data is None and named.run is None:
        raise UserError(
            f"{path} is a model, not a run with a text of its own: name the text, --data PATH-or-id"
        )
    if batch_size is not None and not 1 <= batch_size <= LARGEST:
        more = f", {LARGEST} at most" if batch_size > LARGEST else ""
        raise UserError(f"--batch-size is {batch_size}; expected 1 or more{more}")
    windows = named.batch_size if batch_size is None else batch_size
    about = {"checkpoint": str(checkpoint), "step": step}
    if data is None:
        if context is not None or overlap or tokenizer:
            raise UserError(
                "--context, --overlap and --tokenizer are for --data; a run's own windows are fixed: "
                "leave them out, or name a text"
            )
        losses = _own_losses(named, windows, device)
        _check_finite(losses["val_loss"] + losses["tune_loss"], path)
        return about | losses
    longest = named.longest
    context = (named.context if named.run else min(longest or 2048, 2048)) if context is None else context
    if context < 1 or (longest is not None and context > longest):
        raise UserError(
            f"--context is {context}; {named.name} takes 1 to {longest or 'any number of'} tokens"
        )
    source = open_source(data)
    own = tokenizer_of(named, checkpoint, tokenizer)
    model = nn.Module.to(named.models[-1][1](), device)
    found = text_loss(
        model,
        encoder_of(own),
        source.documents(),
        first=first_token(named, own),
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


def _own_losses(named: NamedModel, batch_size: int, device: str) -> dict[str, Any]:
    """Return loss and bits per byte on the fixed windows of a run's val and tune splits."""
    assert named.run is not None
    config = read_run_config(named.run)
    data = prepare_data(
        config.data,
        vocab_size=config.model.vocab_size,
        context=config.model.context,
        progress=sys.stderr.isatty(),
    )
    check_same_text(named.run, data.describe())
    model = nn.Module.to(named.models[-1][1](), device)
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
