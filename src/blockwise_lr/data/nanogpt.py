"""Read nanoGPT's `train.bin` and `val.bin` in place: memory-mapped uint16 tokens without a header."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr.data.shards import CHECKSUM_LIMIT, ShardFile, TokenShards
from blockwise_lr.data.vocabulary import Encoder
from blockwise_lr.errors import UserError
from blockwise_lr.files import expanded, reading, sha256_of

BINS = ("train.bin", "val.bin")
_BLOCK = 2**20  # tokens in a block that is compared with the vocabulary
_BLOCKS = 64  # number of such blocks in a large file


def find_bins(data: str) -> Path | None:
    """Return the folder `data` if it holds both bins, otherwise None.

    Raises:
        UserError: the folder holds only one of them.
    """
    if not data:  # an empty path would be the working directory
        return None
    folder = expanded(data)
    with reading(folder):
        there = [name for name in BINS if (folder / name).is_file()]
    if len(there) == 1:
        raise UserError(f"{folder} holds {there[0]} only; expected both train.bin and val.bin")
    return folder if there else None


def load_bins(
    folder: Path, vocab_size: int, tokenizer: Encoder | None = None
) -> tuple[dict[str, TokenShards], dict[str, Any]]:
    """Return the splits of nanoGPT's bins, and their description.

    The train split is train.bin. The splits tune, val and measure are the first, second and last third of val.bin.

    Tokens are compared with `vocab_size` and with the tokenizer: all tokens of bins below 256 MB, and 64 evenly spaced
    blocks of 2 MB in larger bins.

    Args:
        folder: the folder that holds the bins.
        vocab_size: rows of the model's embedding.
        tokenizer: the tokenizer that wrote the bins; None if it is not known.

    Raises:
        UserError: a bin has an odd number of bytes, or a token outside the vocabulary of the model or of the tokenizer.
    """
    train, held_out = (folder / name for name in BINS)
    with reading(folder):
        hashes = {path.name: _check(path, vocab_size, tokenizer) for path in (train, held_out)}
    n_train, n_held_out = (path.stat().st_size // 2 for path in (train, held_out))
    borders = [n_held_out * third // 3 for third in range(4)]
    runs = {"train": (train, 0, n_train)}
    for name, start, stop in zip(("tune", "val", "measure"), borders, borders[1:]):
        runs[name] = (held_out, start, stop)
    splits = {
        name: TokenShards(
            name, [ShardFile(path, stop - start, start)] if stop > start else [], "<u2", None, str(folder)
        )
        for name, (path, start, stop) in runs.items()
    }
    return splits, {
        "source": str(folder),
        "identity": {
            "kind": "nanogpt",
            "bytes": {path.name: path.stat().st_size for path in (train, held_out)},
        },
        "tokenizer_sha256": None,
        "dtype": "uint16",
        "split": "train.bin: train; the thirds of val.bin: tune, val, measure",
        "content_sha256": hashlib.sha256(repr(hashes).encode()).hexdigest(),
    }


def _check(path: Path, vocab_size: int, tokenizer: Encoder | None) -> str:
    """Compare a bin's tokens with the vocabulary, and return their hash: all of a small file, blocks of a large one."""
    size = path.stat().st_size
    if size % 2:
        raise UserError(
            f"{path} has {size} bytes; uint16 tokens take an even number: cut short, or not nanoGPT's"
        )
    tokens = np.memmap(path, "<u2", "r") if size else np.empty(0, "<u2")
    small = size < CHECKSUM_LIMIT
    starts = (
        range(0, len(tokens), _BLOCK)
        if small
        else np.linspace(0, len(tokens) - _BLOCK, _BLOCKS, dtype=np.int64)
    )
    digest = hashlib.sha256(str(size).encode())
    for start in starts:
        block = tokens[start : start + _BLOCK]
        if (largest := int(block.max())) >= vocab_size:
            raise UserError(
                f"{path} holds token {largest}, the model's vocabulary is {vocab_size}: "
                f"set --vocab-size {largest + 1} or more"
            )
        if tokenizer is not None and largest >= tokenizer.n_tokens:
            raise UserError(
                f"{path} holds token {largest}, the tokenizer has {tokenizer.n_tokens} tokens: it did not write this "
                "file; name the one that did by --tokenizer, or leave it out"
            )
        digest.update(block.tobytes())
    return sha256_of(path) if small else f"sampled:{digest.hexdigest()}"
