"""Prepare a text for training: `prepare_data` splits and tokenizes it, and two data sets read windows of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.document_progress import documents_bar
from blockwise_lr.data.nanogpt import find_bins, load_bins
from blockwise_lr.data.shards import (
    FORMAT_VERSION,
    HEADER,
    SPLITS,
    TokenShards,
    load_shards,
    split_of,
    verify_shards,
)
from blockwise_lr.data.sources import Source, open_source
from blockwise_lr.data.token_cache import cache_folder, cache_key, hold_lock, reporting_denied_access
from blockwise_lr.data.tokenize import write_shards
from blockwise_lr.data.vocabulary import (
    END_OF_TEXT,
    Encoder,
    check_vocabulary,
    end_of_text_id,
    load_tokenizer,
    train_bpe,
)
from blockwise_lr.data.windows import FixedWindows, TrainingStream, require_window
from blockwise_lr.errors import UserError
from blockwise_lr.files import write_text_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["FixedWindows", "TokenData", "TrainingStream", "prepare_data"]

# Each held-out split gets 1 in 16 documents, or 1 in 200 if that still gives it 16 documents or more.
SMALL_MODULUS, LARGE_MODULUS = 16, 200


@dataclass(frozen=True)
class TokenData:
    """The four splits of one text as tokens, and the tokenizer that made them."""

    train: TokenShards
    tune: TokenShards
    val: TokenShards
    measure: TokenShards
    tokenizer: PreTrainedTokenizerFast | None
    """transformers' tokenizer, for checkpoints; None for nanoGPT's bins without one."""
    description: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return a description for JSON.

        It has the source, the tokenizer and its hash, the dtype, the rule of the split, the tokens and documents of
        each split, and `content_sha256`, which is equal exactly if all tokens are equal.
        """
        return {
            **self.description,
            "splits": {
                name: {"tokens": shards.n_tokens, "documents": shards.n_documents}
                for name, shards in zip(SPLITS, self._splits())
            },
        }

    def verify(self) -> None:
        """Verify the checksum of every shard. Loading verifies them only below 256 MB.

        Raises:
            UserError: a shard was altered; the message names it.
        """
        verify_shards(self._splits(), "delete its folder to build it again")

    def _splits(self) -> tuple[TokenShards, ...]:
        return self.train, self.tune, self.val, self.measure


def prepare_data(config: DataConfig, *, vocab_size: int, context: int, progress: bool = True) -> TokenData:
    """Return the tokens of a text, from the cache if it was tokenized before.

    Documents are split by index. The splits tune, val and measure get 1 in 16 documents each, or 1 in 200 from 3 200
    documents on. All others are the train split, and the tokenizer is trained on it alone.

    Several processes may call this at once: one tokenizes, the others wait.

    Args:
        config: the text, the tokenizer and the cache.
        vocab_size: rows of the model's embedding; also the size of a BPE that is trained here.
        context: length of a window, in tokens; every split must hold at least one window.
        progress: show progress on stderr.

    Returns:
        The four splits, the tokenizer and their description.

    Raises:
        UserError: the text does not exist or is too short, the tokenizer has more than `vocab_size` tokens, or a shard
            is corrupt.

    Example:
        >>> data = prepare_data(DataConfig(), vocab_size=3072, context=128)          # doctest: +SKIP
        >>> data.val.n_tokens                                                        # doctest: +SKIP
        179179
    """
    if (folder := find_bins(config.data)) is not None:
        tokenizer = None if config.tokenizer == "bpe" else load_tokenizer(config.tokenizer, vocab_size)
        splits, description = load_bins(
            folder, vocab_size, None if tokenizer is None else _encoder(tokenizer, config)
        )
        description["tokenizer"] = None if tokenizer is None else config.tokenizer
    else:
        splits, tokenizer, description = _prepare(config, vocab_size, progress)
    for shards in splits.values():
        require_window(shards, context)
    return TokenData(**splits, tokenizer=tokenizer, description=description)


def _prepare(
    config: DataConfig, vocab_size: int, progress: bool
) -> tuple[dict[str, TokenShards], PreTrainedTokenizerFast, dict[str, Any]]:
    source = open_source(config)
    cache = cache_folder(config)
    with reporting_denied_access(cache, config):
        return _prepare_in(cache, source, config, vocab_size, progress)


def _prepare_in(
    cache: Path, source: Source, config: DataConfig, vocab_size: int, progress: bool
) -> tuple[dict[str, TokenShards], PreTrainedTokenizerFast, dict[str, Any]]:
    identity = {**source.identity(), "max_documents": config.max_documents, "format": FORMAT_VERSION}
    slug = re.sub(r"[^\w.-]+", "-", source.name).strip("-.")[-40:] or "text"
    if config.tokenizer == "bpe":
        tokenizer = _trained_tokenizer(
            source,
            cache / "tokenizers" / f"{slug}-bpe{vocab_size}-{cache_key(identity, vocab_size)}",
            vocab_size,
            progress,
        )
    else:
        tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    encoder = _encoder(tokenizer, config)
    check_vocabulary(encoder, config.tokenizer, vocab_size)
    folder = cache / "tokens" / f"{slug}-{cache_key(identity, encoder.sha256)}"
    if not (folder / HEADER).is_file():
        with hold_lock(folder, progress):
            if not (folder / HEADER).is_file():
                _check_absent(folder)
                write_shards(source, encoder, folder, split_modulus(source), progress=progress)
    splits, header = load_shards(folder, encoder.sha256)
    modulus = header["modulus"]
    held_out = {split_of(index, modulus): index for index in range(modulus)}
    description = {
        "source": source.name,
        "identity": identity if len(json.dumps(identity)) < 2000 else {"sha256": cache_key(identity)},
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": encoder.sha256,
        "tokenizer_tokens": encoder.n_tokens,
        "dtype": header["dtype"],
        "split": f"document index modulo {modulus}: "
        + ", ".join(f"{held_out[name]} {name}" for name in SPLITS[1:])
        + ", others train",
        "content_sha256": header["content_sha256"],
    }
    return splits, tokenizer, description


def _encoder(tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> Encoder:
    return Encoder(tokenizer.backend_tokenizer, end_of_text_id(tokenizer, config.tokenizer))


def split_modulus(source: Source) -> int:
    """Return m, where 1 in m documents goes to each held-out split: 200 from 3 200 documents on, otherwise 16.

    Raises:
        UserError: there are fewer than 16 documents, so that a split would be empty.
    """
    n_documents = source.n_documents()
    if n_documents is None:
        n_documents = sum(1 for _ in islice(source.documents(), SMALL_MODULUS * LARGE_MODULUS))
    if n_documents < SMALL_MODULUS:
        raise UserError(
            f"{source.name}: {n_documents} documents cannot be split into train, tune, val and measure, "
            f"at least {SMALL_MODULUS} are needed: give one .txt file or one .jsonl line per document"
        )
    return LARGE_MODULUS if n_documents >= SMALL_MODULUS * LARGE_MODULUS else SMALL_MODULUS


def _trained_tokenizer(
    source: Source, folder: Path, vocab_size: int, progress: bool
) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer.json"
    if not path.is_file():
        with hold_lock(folder, progress):
            if not path.is_file():
                modulus = split_modulus(source)
                with documents_bar(
                    "training the tokenizer", source.n_documents(), enabled=progress
                ) as advance:

                    def training() -> Iterator[str]:
                        for index, text in enumerate(source.documents()):
                            advance(1, len(text))
                            if split_of(index, modulus) == "train":
                                yield text

                    trained = train_bpe(training(), vocab_size)
                folder.mkdir(exist_ok=True)
                write_text_atomic(path, trained.to_str())
    # Raises PermissionError, for which the tokenizers library has no error of its own.
    path.open("rb").close()
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(
            f"{path} cannot be read ({error}): delete the folder {folder} to build it again"
        ) from error
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _check_absent(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder / HEADER} is missing: delete the folder {folder} to build it again")
