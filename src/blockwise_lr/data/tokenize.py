"""Tokenize a corpus of any size into shards.

The text is streamed in batches of a few megabytes, so memory use does not depend on the size of the corpus. The
tokenizer's threads use all cores.

Shards end at fixed places in the text, and each is recorded once it is complete and on disk. A killed run resumes after
the last recorded shard, and the resulting files are byte-identical.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt

from blockwise_lr.data.document_progress import documents_bar
from blockwise_lr.data.shards import SPLITS, split_of, write_header
from blockwise_lr.data.sources import Source
from blockwise_lr.data.vocabulary import Encoder
from blockwise_lr.errors import UserError
from blockwise_lr.files import storing, write_json_atomic
from blockwise_lr.json_values import typed

# Characters of text in one shard, over all splits. A killed run loses at most this much work.
SHARD_CHARACTERS = 256_000_000
BATCH_CHARACTERS = 2_000_000
PROGRESS = "progress.json"


@dataclass
class _Batch:
    first: int
    """Index of the batch's first document."""
    texts: list[str]
    ends_shard: bool


def _batches(documents: Iterator[str], start: int, shard_characters: int) -> Iterator[_Batch]:
    # Only the text decides where shards end: not batches, cores, or the place where a killed run resumes.
    texts: list[str] = []
    in_batch = in_shard = 0
    first = start
    for text in documents:
        texts.append(text)
        in_batch += len(text)
        in_shard += len(text)
        ends_shard = in_shard >= shard_characters
        if ends_shard or in_batch >= BATCH_CHARACTERS or len(texts) >= 10_000:
            yield _Batch(first, texts, ends_shard)
            first += len(texts)
            texts, in_batch = [], 0
            in_shard = 0 if ends_shard else in_shard
    if texts:
        yield _Batch(first, texts, False)


def _encoded(batches: Iterator[_Batch], encoder: Encoder) -> Iterator[tuple[_Batch, list[npt.NDArray[Any]]]]:
    # With two batches in flight, one keeps the cores busy while the other's ids are copied out of the tokenizer.
    with ThreadPoolExecutor(2) as pool:
        waiting: deque[tuple[_Batch, Future[list[npt.NDArray[Any]]]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(encoder.encode, batch.texts)))
            if len(waiting) > 2:
                batch, tokens = waiting.popleft()
                yield batch, tokens.result()
        for batch, tokens in waiting:
            yield batch, tokens.result()


class _ShardWriter:
    """Writes one shard of every split from consecutive documents.

    Args:
        folder: the folder of the shards.
        number: number of the shard, from 0 on.
        first: index of the shard's first document.
    """

    def __init__(self, folder: Path, number: int, first: int) -> None:
        self.folder = folder
        self.number = number
        self.first = self.next = first
        self._files: dict[str, IO[bytes]] = {}
        self._hashes = {name: hashlib.sha256() for name in SPLITS}
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._documents = dict.fromkeys(SPLITS, 0)

    def add(self, split: str, tokens: npt.NDArray[Any]) -> None:
        """Append the tokens of the next document; an empty document only advances the index."""
        self.next += 1
        if not len(tokens):
            return
        data = tokens.tobytes()
        path = self.folder / self._name(split)
        with storing(path):
            if split not in self._files:
                path.parent.mkdir(exist_ok=True)
                self._files[split] = path.open("wb")
            self._files[split].write(data)
        self._hashes[split].update(data)
        self._tokens[split] += len(tokens)
        self._documents[split] += 1

    def close(self) -> dict[str, Any]:
        """Flush the shard to disk, and return its record for the progress file."""
        for split, file in self._files.items():
            with storing(self.folder / self._name(split)):
                file.flush()
                os.fsync(file.fileno())
                file.close()
        return {
            "first": self.first,
            "next": self.next,
            "splits": {
                split: {
                    "file": self._name(split),
                    "tokens": self._tokens[split],
                    "documents": self._documents[split],
                    "sha256": self._hashes[split].hexdigest(),
                }
                for split in self._files
            },
        }

    def _name(self, split: str) -> str:
        return f"{split}/shard-{self.number:05d}.bin"


def write_shards(
    source: Source,
    encoder: Encoder,
    folder: Path,
    modulus: int,
    *,
    progress: bool = False,
    shard_characters: int = SHARD_CHARACTERS,
) -> None:
    """Tokenize `source` into `folder`, which appears when it is complete.

    Args:
        source: the documents.
        encoder: the tokenizer.
        folder: the folder of the shards. Until they are complete, they are in `<folder>.partial`; shards that a killed
            run left there are kept.
        modulus: 1 in `modulus` documents goes to each of tune, val and measure.
        progress: show a progress bar on stderr.
        shard_characters: text in one shard, in characters.

    Raises:
        UserError: a split has no text.
        StorageError: the disk is full. Complete shards are kept, and the next call resumes after them.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    records = _finished(partial, encoder.dtype.itemsize)
    start = records[-1]["next"] if records else 0
    writer = _ShardWriter(partial, len(records), start)
    with documents_bar("tokenizing", source.n_documents(), start, enabled=progress) as advance:
        for batch, encoded in _encoded(_batches(source.documents(start), start, shard_characters), encoder):
            for index, tokens in enumerate(encoded, batch.first):
                writer.add(split_of(index, modulus), tokens)
            advance(len(batch.texts), sum(map(len, batch.texts)))
            if batch.ends_shard:
                records.append(writer.close())
                write_json_atomic(partial / PROGRESS, records)
                writer = _ShardWriter(partial, len(records), writer.next)
    if writer.next > writer.first:
        records.append(writer.close())
    splits = {name: _summary(name, records) for name in SPLITS}
    for name, split in splits.items():
        if not split["documents"]:
            shutil.rmtree(partial)
            raise UserError(
                f"{source.name}: none of the documents of the split {name} has any text: "
                "give more documents that are not empty"
            )
    write_header(
        partial,
        {
            "source": source.name,
            "tokenizer_sha256": encoder.sha256,
            "end_of_text": encoder.end_of_text,
            "vocab_size": encoder.n_tokens,
            "dtype": encoder.dtype.name,
            "modulus": modulus,
            "splits": splits,
        },
    )
    (partial / PROGRESS).unlink(missing_ok=True)
    partial.replace(folder)


def _finished(partial: Path, itemsize: int) -> list[dict[str, Any]]:
    """Return the records of complete shards, up to the first incomplete one; none if the progress file is damaged."""
    whole: list[dict[str, Any]] = []
    try:
        for record in typed(json.loads((partial / PROGRESS).read_text("utf-8")), list):
            if (
                typed(record["first"], int) != (whole[-1]["next"] if whole else 0)
                or record["splits"].keys() - SPLITS
            ):
                raise ValueError("the records do not follow each other, or name another split")
            typed(record["next"], int)
            for shard in record["splits"].values():
                path = partial / typed(shard["file"], str)
                typed(shard["documents"], int), typed(shard["sha256"], str)
                if not path.is_file() or path.stat().st_size != typed(shard["tokens"], int) * itemsize:
                    return whole
            whole.append(record)
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        return []
    return whole


def _summary(split: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    shards = [record["splits"][split] for record in records if split in record["splits"]]
    return {
        "tokens": sum(shard["tokens"] for shard in shards),
        "documents": sum(shard["documents"] for shard in shards),
        "shards": [{name: shard[name] for name in ("file", "tokens", "sha256")} for shard in shards],
    }
