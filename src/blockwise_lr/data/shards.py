"""Token shards on disk: splits, header, checks, and memory-mapped reading.

A folder of shards holds `header.json` and, for each split, `<split>/shard-00000.bin`, `shard-00001.bin`, and so on. A
shard is a sequence of little-endian unsigned integers, one for each token, with an end-of-text token after every
document. Loading raises an error that names any missing, short or altered file.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blockwise_lr.errors import UserError
from blockwise_lr.files import sha256_of, write_json_atomic
from blockwise_lr.json_values import typed

FORMAT_VERSION = 1
HEADER = "header.json"
SPLITS = ("train", "tune", "val", "measure")
SMALLEST_MODULUS = 4  # with a smaller modulus, split_of leaves a split without documents
# Hashing 256 MB takes about half a second. Above this size, loading compares file sizes only.
CHECKSUM_LIMIT = 256 * 2**20


def split_of(document: int, modulus: int) -> str:
    """Return the split of the document at an index: 1 in `modulus` each for tune, val and measure, evenly spread.

    Only the index decides, so a stream of unknown length can be split while it is read.

    Args:
        document: index of the document.
        modulus: number of documents of which each held-out split gets one.

    Example:
        >>> [split_of(i, 16) for i in (4, 5, 10, 15)]
        ['train', 'tune', 'val', 'measure']
    """
    held_out = {modulus // 3: "tune", 2 * modulus // 3: "val", modulus - 1: "measure"}
    return held_out.get(document % modulus, "train")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the little-endian dtype of tokens: uint16 for at most 65 536 tokens, otherwise uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class ShardFile:
    """A contiguous range of tokens in one file."""

    path: Path
    n_tokens: int
    """Length of the range, in tokens."""
    start: int = 0
    """Start of the range in the file, in tokens."""
    sha256: str | None = None
    """Checksum of the whole file; None if there is none, as for nanoGPT's bins."""


class TokenShards:
    """The tokens of one split, memory-mapped and read like one array.

    Args:
        split: "train", "tune", "val" or "measure".
        files: the ranges of tokens, in order.
        dtype: uint16 or uint32, little-endian.
        n_documents: number of documents in the split; None if it is unknown, as for nanoGPT's bins.
        source: name of the text, for messages.

    Example:
        >>> data.val.read(0, 4)                         # doctest: +SKIP
        array([ 464, 3616,  286, 1204])
    """

    def __init__(
        self,
        split: str,
        files: Sequence[ShardFile],
        dtype: npt.DTypeLike,
        n_documents: int | None,
        source: str = "the data",
    ) -> None:
        self.split = split
        self.files = tuple(files)
        self.dtype = np.dtype(dtype)
        self.n_documents = n_documents
        self.source = source
        self._ends = list(accumulate(file.n_tokens for file in self.files))

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the split, including end-of-text tokens."""
        return self._ends[-1] if self._ends else 0

    def n_windows(self, context: int) -> int:
        """Return the number of complete windows of `context` tokens, without overlap."""
        return self.n_tokens // context

    @cached_property
    def _maps(self) -> list[npt.NDArray[Any]]:
        return [
            np.memmap(f.path, self.dtype, "r", f.start * self.dtype.itemsize, f.n_tokens) for f in self.files
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memmap contains its data. Data-loading workers map the files themselves instead.
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Return the tokens start ... start + length - 1 as int64. The range may cross file borders.

        Raises:
            IndexError: the range is not inside the split.
        """
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start}..{start + length} of a split of {self.n_tokens}")
        out = np.empty(length, np.int64)
        done = 0
        index = bisect_right(self._ends, start)
        while done < length:
            tokens = self._maps[index]
            offset = start + done - (self._ends[index] - len(tokens))
            part = tokens[offset : offset + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            index += 1
        return out

    def __repr__(self) -> str:
        documents = "?" if self.n_documents is None else self.n_documents
        return f"TokenShards({self.split}: {self.n_tokens} tokens, {documents} documents)"


def write_header(folder: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Write `header` with the format version and the hash of all shards added, and return it."""
    whole = {"format_version": FORMAT_VERSION, **header, "content_sha256": _content_sha256(header["splits"])}
    write_json_atomic(folder / HEADER, whole)
    return whole


def load_shards(folder: Path, tokenizer_sha256: str) -> tuple[dict[str, TokenShards], dict[str, Any]]:
    """Load the four splits in `folder` and its header, and check them.

    File sizes are always compared with the header. Checksums are compared only if all shards together have less than
    256 MB; `verify_shards` compares them at any size.

    Args:
        folder: a folder that `prepare_data` built.
        tokenizer_sha256: hash of the tokenizer that the caller uses.

    Raises:
        UserError: the header is missing, the format or the tokenizer differs, or a file is missing, altered or of the
            wrong size. The message names the file, the expected and the actual value, and the folder to delete.
        PermissionError: this user may not read the files.
    """
    advice = f"delete the folder {folder} to build it again"
    try:
        header = typed(json.loads((folder / HEADER).read_text("utf-8")), dict)
        version, written_with = header["format_version"], typed(header["tokenizer_sha256"], str)
        if header["dtype"] not in ("uint16", "uint32") or typed(header["modulus"], int) < SMALLEST_MODULUS:
            raise ValueError(f"no tokens are {header['dtype']!r}, or split by {header['modulus']!r}")
        dtype = np.dtype(header["dtype"]).newbyteorder("<")
        source = typed(header["source"], str)
        splits = {name: _described(name, folder, header["splits"][name], dtype, source) for name in SPLITS}
        if header["content_sha256"] != _content_sha256(header["splits"]):
            raise ValueError("its content_sha256 is not that of its shards")
    except PermissionError:  # building the folder again would not help
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / HEADER} cannot be read ({error!r}): {advice}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has shards of format {version}, expected {FORMAT_VERSION}: {advice}")
    if written_with != tokenizer_sha256:
        raise UserError(
            f"{folder} was written with tokenizer {written_with[:12]}..., "
            f"expected {tokenizer_sha256[:12]}...: {advice}"
        )
    for shards in splits.values():
        _check_sizes(shards, advice)
    if sum(shards.n_tokens for shards in splits.values()) * dtype.itemsize < CHECKSUM_LIMIT:
        verify_shards(splits.values(), advice)
    return splits, header


def _described(
    name: str, folder: Path, split: Mapping[str, Any], dtype: np.dtype[Any], source: str
) -> TokenShards:
    """Return one split as the header describes it.

    Raises:
        ValueError, KeyError, TypeError: the header's entry is damaged.
    """
    files = []
    for shard in typed(split["shards"], list):
        # A damaged header must not name files outside the folder.
        if not re.fullmatch(rf"{name}/shard-\d+\.bin", shard["file"]):
            raise ValueError(f"no shard of {name} is called {shard['file']!r}")
        if (tokens := typed(shard["tokens"], int)) < 0:
            raise ValueError(f"{shard['file']} holds {tokens} tokens")
        files.append(ShardFile(folder / shard["file"], tokens, 0, typed(shard["sha256"], str)))
    return TokenShards(name, files, dtype, typed(split["documents"], int), source)


def _content_sha256(splits: Mapping[str, Any]) -> str:
    shards = {name: [shard["sha256"] for shard in splits[name]["shards"]] for name in SPLITS}
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def _check_sizes(shards: TokenShards, advice: str) -> None:
    for file in shards.files:
        expected = (file.start + file.n_tokens) * shards.dtype.itemsize
        if not file.path.is_file():
            raise UserError(f"{file.path} is missing, expected {expected} bytes: {advice}")
        if (size := file.path.stat().st_size) != expected:
            raise UserError(f"{file.path} has {size} bytes, expected {expected}: {advice}")


def verify_shards(splits: Iterable[TokenShards], advice: str) -> None:
    """Read every shard of these splits and compare its checksum with the header's.

    Args:
        splits: the splits to verify.
        advice: what the user should do about a corrupt shard, for the message.

    Raises:
        UserError: a checksum differs; the message names the file and both checksums.
    """
    for shards in splits:
        for file in shards.files:
            if file.sha256 is not None and (got := sha256_of(file.path)) != file.sha256:
                raise UserError(
                    f"{file.path} is corrupt: its sha256 is {got[:12]}..., "
                    f"expected {file.sha256[:12]}...: {advice}"
                )
