"""Loss and bits per byte of a causal language model on any text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from blockwise_lr.data.vocabulary import Encoder
from blockwise_lr.distributed import fully_sharded, reshard, sum_over_ranks
from blockwise_lr.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_IGNORED = -100
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class TextLoss:
    """The loss of a model on a text, with the amount of text.

    Args:
        documents: number of documents that are not empty.
        tokens: number of predicted tokens.
        bytes: number of UTF-8 bytes of the text of these tokens.
        nats: sum of -log p over the predicted tokens.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes. Unlike nats per token, it is comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


class Window(NamedTuple):
    """A part of a document that the model reads in one forward pass."""

    inputs: npt.NDArray[Any]
    """(length,): tokens that the model reads, length <= context."""
    targets: npt.NDArray[Any]
    """(predicted,): the tokens that the last `predicted` outputs must predict."""


def document_windows(
    tokens: npt.NDArray[Any], first: int, context: int, overlap: int = 0
) -> Iterator[Window]:
    """Yield windows that together predict every token of a document exactly once.

    The first window reads `first` and then the document. Each later window begins with the last token that was
    predicted before, or `overlap` tokens earlier. The last window is moved back until it is full, which costs nothing
    and gives its tokens more context. With overlap 0, these are the rolling windows of lm-evaluation-harness.

    Args:
        tokens: (n,) the document, without an end-of-text token.
        first: the token before the document.
        context: largest number of tokens that the model reads at once, 1 or more.
        overlap: number of tokens that a window reads again, 0 to context - 1.

    Example:
        >>> [(w.inputs.tolist(), w.targets.tolist()) for w in document_windows(np.arange(1, 6), 0, context=3)]
        [([0, 1, 2], [1, 2, 3]), ([2, 3, 4], [4, 5])]
    """
    # read[i] is the input at the position that predicts tokens[i].
    read = np.concatenate([[first], tokens[:-1]])
    done = 0
    while done < len(tokens):
        end = min(len(tokens), done + (context - overlap if done else context))
        yield Window(read[max(0, end - context) : end], tokens[done:end])
        done = end


# The input of a process that has no text left while others still have some. Nothing in it is predicted.
_UNCOUNTED = [Window(np.zeros(1, np.int64), np.zeros(0, np.int64))]


@torch.no_grad()
def text_loss(
    model: nn.Module,
    encoder: Encoder,
    documents: Iterable[str],
    *,
    first: int | None = None,
    context: int,
    overlap: int = 0,
    batch_size: int = 16,
) -> TextLoss:
    """Return the loss of a model on documents, computed in the model's precision and summed in float64.

    Every token of a document is predicted exactly once, in the windows of :func:`document_windows`. The token `first`
    before the document and the end of the document are not predicted. The predicted tokens therefore stand for exactly
    the bytes of the text, and empty documents do not count. If a tokenizer changes the text, as T5's does with white
    space, the bytes are still those of the original text.

    Under DDP or ``fully_shard``, every process must call this. Each gets the loss on its own documents, whose number
    may differ between processes.

    Args:
        model: a causal language model; `model(input_ids=...)` (batch, length) gives `logits` (batch, length, tokens).
        encoder: the model's tokenizer. Text that looks like a special token is encoded as text.
        documents: the texts, read once and one after another.
        first: the token before each document. Default: the end-of-text token, as in training.
        context, overlap: as in :func:`document_windows`.
        batch_size: windows per forward pass; it changes the result only by rounding.

    Raises:
        UserError: the documents hold no text, or `context` or `overlap` is out of range.

    Example:
        >>> text_loss(model, encoder, ["Fellow citizens"], context=128).bits_per_byte  # doctest: +SKIP
        2.1
    """
    if not 0 <= overlap < context:
        raise UserError(f"--overlap is {overlap}; expected 0 or more and less than the context, {context}")
    device = next(model.parameters()).device
    start = encoder.end_of_text if first is None else first
    n_documents = n_tokens = n_bytes = 0

    def windows() -> Iterator[Window]:
        nonlocal n_documents, n_tokens, n_bytes
        remaining = iter(documents)
        while texts := list(islice(remaining, _DOCUMENTS_AT_ONCE)):
            for text, tokens in zip(texts, encoder.encode(texts)):
                if text:
                    n_documents, n_tokens = n_documents + 1, n_tokens + len(tokens) - 1
                    n_bytes += len(text.encode())
                    yield from document_windows(tokens[:-1], start, context, overlap)

    together = _forward_passes_are_collective(model)
    nats = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        remaining = windows()
        while True:
            batch = list(islice(remaining, batch_size))
            if not batch and not (together and sum_over_ranks(0, device)):
                break
            if together and batch:
                sum_over_ranks(1, device)
            inputs, targets = _padded(batch or _UNCOUNTED)
            logits = model(input_ids=inputs.to(device)).logits.float()
            losses = cross_entropy(
                logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=_IGNORED, reduction="none"
            )
            nats += losses.double().sum().cpu()
    finally:
        model.train(was_training)
        reshard(model)
    if not n_tokens:
        raise UserError(
            "there is no text in any of the documents: nothing to predict; expected at least one token, so name "
            "another --data"
        )
    return TextLoss(n_documents, n_tokens, n_bytes, float(nats))


def _forward_passes_are_collective(model: nn.Module) -> bool:
    """Return whether forward passes communicate, so that all processes must run the same number of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(model, nn.parallel.DistributedDataParallel) or bool(fully_sharded(model))


def _padded(batch: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows as (batch, length) inputs and targets.

    Padding follows the text, where a causal model cannot attend to it.
    """
    length = max(len(window.inputs) for window in batch)
    inputs = torch.zeros(len(batch), length, dtype=torch.int64)
    targets = torch.full((len(batch), length), _IGNORED)
    for row, window in enumerate(batch):
        n = len(window.inputs)
        inputs[row, :n] = torch.from_numpy(window.inputs.astype(np.int64))
        targets[row, n - len(window.targets) : n] = torch.from_numpy(window.targets.astype(np.int64))
    return inputs, targets


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int64] | None:
    """Return the number of bytes of text that each token id stands for; special tokens stand for 0 bytes.

    Returns:
        An array of shape (tokens,); None if the tokenizer is not byte-level, since a single token then does not
        determine its bytes.

    Example:
        >>> token_bytes(data.tokenizer)[data.val.read(0, 4)]  # doctest: +SKIP
        array([4, 7, 3, 8])
    """
    backend = tokenizer.backend_tokenizer
    decoder = json.loads(backend.to_str())["decoder"] or {}
    if "ByteLevel" not in [each.get("type") for each in (decoder, *decoder.get("decoders", ()))]:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for piece, index in vocabulary.items():
        lengths[index] = len(piece)  # the byte-level alphabet has one character per byte
    for index, added in backend.get_added_tokens_decoder().items():
        lengths[index] = 0 if added.special else len(added.content.encode())
    return lengths
