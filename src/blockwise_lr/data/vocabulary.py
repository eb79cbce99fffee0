"""Train or load a tokenizer, and prepare it to encode whole documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from blockwise_lr.data.shards import token_dtype
from blockwise_lr.errors import UserError
from blockwise_lr.files import check_name, reading
from blockwise_lr.reason import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# The merges of a BPE settle with far less text. More would only cost memory and time.
BPE_CHARACTERS = 100_000_000
# The trainer allocates memory for all tokens at once, and aborts the process if that fails.
BPE_TOKENS = 2**20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenization. Token 0 is <|endoftext|>.

    Args:
        documents: documents of the training split; their first 100 million characters are used.
        vocab_size: the largest number of tokens; a small text may yield fewer.

    Raises:
        UserError: `vocab_size` is below 257 (256 bytes and the end-of-text token), or above 1 048 576.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise UserError(
            f"a byte-level tokenizer needs at least {len(alphabet) + 1} tokens, --vocab-size is {vocab_size}"
        )
    if vocab_size > BPE_TOKENS:
        raise UserError(
            f"a byte-level tokenizer of at most {BPE_TOKENS} tokens is trained here, --vocab-size is {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_first_characters(documents, BPE_CHARACTERS), trainer)
    return tokenizer


def _first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    for text in documents:
        if limit <= 0:
            return
        yield text
        limit -= len(text)


class Encoder:
    """Encodes whole documents for the shards, without truncation, and with one end-of-text token after each.

    Text that looks like a special token is encoded as ordinary text.

    Args:
        tokenizer: any `tokenizers.Tokenizer`; the encoder copies it.
        end_of_text: id of the token that ends a document.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_text: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.end_of_text = end_of_text
        self.sha256 = hashlib.sha256(f"{end_of_text}\n{self._tokenizer.to_str()}".encode()).hexdigest()
        self._tokenizer.encode_special_tokens = True
        self.n_tokens = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = token_dtype(self.n_tokens)

    def encode(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        """Return the tokens of each text, including its end-of-text token; an empty text has no tokens."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array([*encoding.ids, self.end_of_text] if text else [], self.dtype)
            for text, encoding in zip(texts, encodings)
        ]


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer was saved in `folder`."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def load_tokenizer(name: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Load a Hugging Face tokenizer by id or folder. Its own code is never executed.

    Args:
        name: the id or the folder.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: the tokenizer cannot be loaded, is not a fast one, or has more than `vocab_size` tokens.
    """
    from transformers import AutoTokenizer

    check_name(name, "--tokenizer")
    with reading(name):
        is_folder = Path(name).is_dir()
        if is_folder and not holds_tokenizer(
            Path(name)
        ):  # transformers would silently create an empty tokenizer
            raise UserError(f"the folder {name} holds no tokenizer (tokenizer.json)")
    if not is_folder and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"there is no folder {name!r} with a tokenizer, and it is not a Hugging Face id")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and the network raise errors of any class
        raise UserError(f"the tokenizer {name!r} cannot be loaded: {reason(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {name!r} has no fast version (tokenizer.json), which is needed here")
    check_vocabulary(Encoder(tokenizer.backend_tokenizer, end_of_text_id(tokenizer, name)), name, vocab_size)
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def end_of_text_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Return the id of the token that ends a document: the tokenizer's eos token, otherwise its sep token.

    Raises:
        UserError: the tokenizer has neither.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise UserError(f"the tokenizer {name!r} has no end-of-text token: set its eos_token and save it again")


def check_vocabulary(encoder: Encoder, name: str, vocab_size: int) -> None:
    """Check that a model's embedding has a row for every token.

    Raises:
        UserError: the tokenizer has more than `vocab_size` tokens.
    """
    if encoder.n_tokens > vocab_size:
        raise UserError(
            f"the tokenizer {name!r} has {encoder.n_tokens} tokens, the model's vocabulary is {vocab_size}: "
            f"set --vocab-size {encoder.n_tokens} or more"
        )
