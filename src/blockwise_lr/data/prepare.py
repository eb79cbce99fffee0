"""Text to the windows a trainer reads: `prepare_data`, and the two data sets over its splits."""

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
from blockwise_lr.data.token_cache import cache_folder, key, only_one, using
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

# 1 in 16 documents to each held-out split of a small corpus, 1 in 200 where that still gives each 16 or more.
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
        """JSON-able: source, tokenizer and its hash, dtype, the rule of the split, tokens and documents by
        split, and `content_sha256`, equal exactly when all tokens are.
        """
        return {
            **self.description,
            "splits": {
                name: {"tokens": shards.n_tokens, "documents": shards.n_documents}
                for name, shards in zip(SPLITS, self._splits())
            },
        }

    def verify(self) -> None:
        """Compare every shard's checksum, whatever the size (loading does so below 256 MB only).

        Raises:
            UserError: a shard was altered; names it.
        """
        verify_shards(self._splits(), "delete its folder to build it again")

    def _splits(self) -> tuple[TokenShards, ...]:
        return self.train, self.tune, self.val, self.measure


def prepare_data(config: DataConfig, *, vocab_size: int, context: int, progress: bool = True) -> TokenData:
    """Tokens of the text that `config` names: tokenized now, or found in the cache.

    Documents are split by index, 1 in 16 (1 in 200 from 3 200 documents on) to each of tune, val and measure,
    the rest to train; the tokenizer is trained on train alone. Any number of processes may call this at once:
    one works, the others wait for it.

    Args:
        config: where the text is, which tokenizer, where the cache is.
        vocab_size: rows of the model's embedding, in tokens; the size of a BPE that is trained here.
        context: length of a window, in tokens; every split must hold at least one.
        progress: show progress on stderr.

    Raises:
        UserError: no such text; too little of it; a tokenizer larger than vocab_size; a corrupt shard.

    Example:
        >>> data = prepare_data(DataConfig(), vocab_size=3072, context=128)          # doctest: +SKIP
        >>> data.val.n_tokens                                                        # doctest: +SKIP
        179179
    """
    if (folder := find_bins(config.data)) is not None:
        splits, description = load_bins(folder, vocab_size)
        tokenizer = None if config.tokenizer == "bpe" else load_tokenizer(config.tokenizer, vocab_size)
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
    with using(cache):
        return _prepare_in(cache, source, config, vocab_size, progress)


def _prepare_in(
    cache: Path, source: Source, config: DataConfig, vocab_size: int, progress: bool
) -> tuple[dict[str, TokenShards], PreTrainedTokenizerFast, dict[str, Any]]:
    identity = {**source.identity(), "max_documents": config.max_documents, "format": FORMAT_VERSION}
    slug = re.sub(r"[^\w.-]+", "-", source.name).strip("-.")[-40:] or "text"
    if config.tokenizer == "bpe":
        tokenizer = _trained_tokenizer(
            source,
            cache / "tokenizers" / f"{slug}-bpe{vocab_size}-{key(identity, vocab_size)}",
            vocab_size,
            progress,
        )
    else:
        tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    encoder = Encoder(tokenizer.backend_tokenizer, end_of_text_id(tokenizer, config.tokenizer))
    check_vocabulary(encoder, config.tokenizer, vocab_size)
    folder = cache / "tokens" / f"{slug}-{key(identity, encoder.sha256)}"
    if not (folder / HEADER).is_file():
        with only_one(folder, progress):
            if not (folder / HEADER).is_file():
                _refuse_headless(folder)
                write_shards(source, encoder, folder, split_modulus(source), progress=progress)
    splits, header = load_shards(folder, encoder.sha256)
    modulus = header["modulus"]
    held_out = {split_of(index, modulus): index for index in range(modulus)}
    description = {
        "source": source.name,
        "identity": identity if len(json.dumps(identity)) < 2000 else {"sha256": key(identity)},
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


def split_modulus(source: Source) -> int:
    """1 in how many documents goes to each held-out split: 200 from 3 200 documents on, 16 below.

    Raises:
        UserError: fewer than 16 documents, so that a split would be empty.
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
        with only_one(folder, progress):
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
    # The tokenizers library has no error of its own for a file that this user may not read.
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


def _refuse_headless(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder / HEADER} is missing: delete the folder {folder} to build it again")
