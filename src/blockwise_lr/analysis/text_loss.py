"""Loss and bits per byte of a causal language model on text: what is predicted, and which bytes that stands for."""

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
    """What was predicted, and how well.

    Args:
        documents: documents with any text.
        tokens: predicted tokens.
        bytes: UTF-8 bytes of the text that those tokens stand for.
        nats: sum of -log p over the predicted tokens.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: comparable between tokenizers, which nats a token are not."""
        return self.nats / math.log(2) / self.bytes


class Window(NamedTuple):
    """One forward pass over part of a document."""

    inputs: npt.NDArray[Any]
    """(length,): tokens that the model reads, length <= context."""
    targets: npt.NDArray[Any]
    """(predicted,): the tokens that its last `predicted` outputs are held against."""


def document_windows(
    tokens: npt.NDArray[Any], first: int, context: int, overlap: int = 0
) -> Iterator[Window]:
    """Windows in which every token of a document is predicted exactly once.

    The first window reads `first` and then the document. Each later one begins with the last token predicted before,
    or `overlap` tokens earlier. The last one is moved back until it is full: that costs nothing and gives its tokens
    more to go by. With overlap 0 these are lm-evaluation-harness's rolling windows.

    Args:
        tokens: (n,) the document, without a token for its end.
        first: the token that the document begins behind.
        context: most tokens that the model reads at once, 1 or more.
        overlap: tokens that a window reads again, 0 to context - 1.

    Example:
        >>> [(w.inputs.tolist(), w.targets.tolist()) for w in document_windows(np.arange(1, 6), 0, context=3)]
        [([0, 1, 2], [1, 2, 3]), ([2, 3, 4], [4, 5])]
    """
    read = np.concatenate([[first], tokens[:-1]])  # what is read where tokens[i] is predicted
    done = 0
    while done < len(tokens):
        end = min(len(tokens), done + (context - overlap if done else context))
        yield Window(read[max(0, end - context) : end], tokens[done:end])
        done = end


# What a process reads that has no text left while others have: nothing of it is predicted.
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
    """The model's loss on every document, in its own precision, summed in float64.

    Every token of a document's text is predicted exactly once, from what :func:`document_windows` lets it read.
    `first` stands before them and is itself never predicted, nor is the end of the document. So the predicted tokens
    stand for the text's own bytes, no more and no less, and empty documents count for nothing. (A tokenizer that
    changes the text, such as T5's with its white space, is measured on the text as it was given.)

    Under DDP or ``fully_shard`` every process calls this and gets the loss on the documents that it gave. They may be
    other ones than those of the other processes, and more or fewer.

    Args:
        model: a causal language model; `model(input_ids=...)` (batch, length) gives `logits` (batch, length, tokens).
        encoder: its tokenizer. What looks like a special token is encoded as text.
        documents: their text, read once and never held all at once.
        first: the token that documents begin behind; None: the end-of-text token, as in training.
        context, overlap: as for :func:`document_windows`.
        batch_size: windows a forward pass; changes nothing but the last bits.

    Raises:
        UserError: no text at all; context or overlap out of range.

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
        raise UserError("there is no text in any of the documents: nothing to predict")
    return TextLoss(n_documents, n_tokens, n_bytes, float(nats))


def _forward_passes_are_collective(model: nn.Module) -> bool:
    """Whether a process that stops earlier than the others would leave them waiting for it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(model, nn.parallel.DistributedDataParallel) or bool(fully_sharded(model))


def _padded(batch: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows as (batch, length) inputs and targets. Padding follows the text, where a causal model cannot see it."""
    length = max(len(window.inputs) for window in batch)
    inputs = torch.zeros(len(batch), length, dtype=torch.int64)
    targets = torch.full((len(batch), length), _IGNORED)
    for row, window in enumerate(batch):
        n = len(window.inputs)
        inputs[row, :n] = torch.from_numpy(window.inputs.astype(np.int64))
        targets[row, n - len(window.targets) : n] = torch.from_numpy(window.targets.astype(np.int64))
    return inputs, targets


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int64] | None:
    """The bytes of text that each token stands for, by id; special tokens stand for none.

    Returns:
        (tokens,) lengths; None where a token alone does not tell (a tokenizer that is not byte-level).

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
        lengths[index] = len(piece)  # one character of the byte-level alphabet a byte
    for index, added in backend.get_added_tokens_decoder().items():
        lengths[index] = 0 if added.special else len(added.content.encode())
    return lengths
