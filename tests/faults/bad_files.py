"""Texts, tokenizers and folders of runs that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from blockwise_lr.checkpoints.manifest import seal
from faults.bad_inputs import Bad, Make, both, cut, field, file, flip, remove

TINY = "train tiny.json --out out"
LINES = "".join(json.dumps({"text": "war and peace " * 9}) + "\n" for _ in range(20))
SUFFIXES = ".txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet"


def text(data: str, *says: str, make: Make | None = None, what: str = "") -> Bad:
    """`train` on this text."""
    return Bad(f"text: {what or data}", f"{TINY} --data '{data}'", says, make)


def documents(name: str, content: str | bytes, n: int = 16) -> Make:
    """A folder of equal .txt files."""
    return both(*(file(f"{name}/{i:02}.txt", content) for i in range(n)))


def parquet(**columns: list[object]) -> Make:
    """a.parquet with these columns."""
    return lambda: pq.write_table(pa.table(columns), "a.parquet")


def spoil_a_page() -> None:
    """Overwrite the first page of a.parquet; its footer stays."""
    whole = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])


def again(what: str, *says: str, make: Make | None = None, given: str = "") -> Bad:
    """`train` into the folder of the run that is there."""
    return Bad(f"run: {what}", f"train tiny.json --out run {given}", says, make)


def seal_again() -> None:
    """As if the newest checkpoint had been saved so."""
    seal(Path("run/checkpoint-4"))


LATIN = "é".encode("latin-1")
NUMBERS: list[object] = list(range(20))
TEXTS: list[object] = ["war and peace " * 9] * 20
UNFINISHED = remove("run/result.json")

# fmt: off
TEXT_FILES = [
    text("nowhere.txt", "there is no file or folder nowhere.txt, and it is not a Hugging Face data set id"),
    text("./nowhere", "there is no file or folder ./nowhere"),
    text("json", "there is no file or folder json", what="a reader of the library datasets"),
    text("nobody/nothing", "'nobody/nothing' is no file or folder, and as a Hugging Face data set",
        "cannot be loaded"),
    text("*.md", "no file matches *.md"),
    text("", "--data is empty", "a folder or a glob", what="nothing"),
    text("notes", f"the folder notes holds no {SUFFIXES} file", make=file("notes/a.md", "x")),
    text("a.csv", f"a.csv has a format that is not supported: expected {SUFFIXES}", make=file("a.csv",
        "text\nx")),
    text("a.txt", "a.txt: 1 documents cannot be split", "at least 16", make=file("a.txt", "war"),
        what="one document"),
    text("bin", "00.txt is not UTF-8 text (byte 128): convert it first", make=documents("bin",
        bytes(range(256)))),
    text("latin", "00.txt is not UTF-8 text (byte 0): convert it first", make=documents("latin", LATIN)),
    text("empties", "none of the documents of the split train has any text", make=documents("empties", "")),
    text("short", "the split tune of short has 2 tokens, one window needs 16", make=documents("short", "a")),
    text("a.jsonl", "0 documents cannot be split", make=file("a.jsonl"), what="empty .jsonl"),
    text("a.jsonl", "a.jsonl, line 21: not JSON", "expected one object a line", make=file("a.jsonl",
        LINES + "{x\n"),
         what="broken .jsonl"),
    text("a.jsonl", "a.jsonl, line 1: not JSON", make=file("a.jsonl", "[" * 100_000),
        what=".jsonl nested without end"),
    text("a.jsonl", "a.jsonl, line 1: holds list; expected one object a line", make=file("a.jsonl",
        "[1]\n" * 20),
         what=".jsonl of lists"),
    text("a.jsonl", "line 21: no field 'text'; the fields are body: choose one with --text-field",
         make=file("a.jsonl", LINES + '{"body": "x"}\n'), what=".jsonl without the field"),
    text("a.jsonl", "line 21: the field 'text' holds int, expected text", make=file("a.jsonl",
        LINES + '{"text": 3}\n'),
         what=".jsonl with a number"),
    text("a.jsonl", "a.jsonl is not UTF-8 text", "convert it first", make=file("a.jsonl",
        b'{"text": "\xff"}\n' * 20),
         what=".jsonl not UTF-8"),
    text("a.jsonl.gz", "cut short or corrupt", "get it again", make=file("a.jsonl.gz",
        gzip.compress(LINES.encode())[:-20]),
         what="truncated .gz"),
    text("a.jsonl.gz", "cut short or corrupt", make=file("a.jsonl.gz", LINES), what=".gz that is none"),
    text("a.jsonl.zst", "cut short or corrupt", "get it again", what="truncated .zst",
         make=file("a.jsonl.zst", pa.compress(LINES.encode(), codec="zstd", asbytes=True)[:-10])),
    text("a.parquet", "a.parquet is not a parquet file", make=file("a.parquet", LINES),
        what=".parquet that is none"),
    text("a.parquet", "no field 'text'; the fields are body", make=parquet(body=TEXTS),
        what=".parquet without the field"),
    text("a.parquet", "the field 'text' holds int", make=parquet(text=NUMBERS), what=".parquet of numbers"),
    text("a.parquet", "is not a parquet file", make=both(parquet(text=TEXTS), cut("a.parquet")),
        what="half a .parquet"),
    text("a.parquet", "a.parquet is corrupt", "get it again", make=both(parquet(text=TEXTS), spoil_a_page),
         what=".parquet with a bad page"),
    text("nano", "nano holds train.bin only; expected both", make=file("nano/train.bin", b"\0\0" * 99),
        what="one bin"),
    text("nano", "val.bin has 501 bytes; uint16 tokens take an even number", what="an odd bin",
         make=both(file("nano/train.bin", b"\0\0" * 500), file("nano/val.bin", b"\0" * 501))),
    text("nano", "val.bin holds token 65535, the model's vocabulary is 300: set --vocab-size 65536",
        what="a bin of others",
         make=both(file("nano/train.bin", b"\0\0" * 500), file("nano/val.bin", b"\xff\xff" * 500))),
    Bad("text: too few documents", f"{TINY} --max-documents 3", ("text: 3 documents cannot be split",)),
    Bad("text: no documents", f"{TINY} --max-documents 0", ("--max-documents is 0, expected at least 1",)),
    Bad("cache: a file", f"{TINY} --cache tiny.json", ("the cache folder tiny.json cannot be made",
        "choose another")),
]

TOKENIZERS = [
    Bad("tokenizer: no folder", f"{TINY} --tokenizer ./nowhere",
        ("there is no folder './nowhere' with a tokenizer",)),
    Bad("tokenizer: not on the Hub", f"{TINY} --tokenizer nobody/none",
        ("the tokenizer 'nobody/none' cannot be loaded",)),
    Bad("tokenizer: a folder of texts", f"{TINY} --tokenizer text",
        ("the folder text holds no tokenizer (tokenizer.json)",)),
    Bad("tokenizer: a model without", f"{TINY} --tokenizer bert",
        ("the folder bert holds no tokenizer (tokenizer.json)",)),
    Bad("tokenizer: too large", f"{TINY} --tokenizer plain --vocab-size 280",
        ("has 300 tokens, the model's vocabulary is 280: set --vocab-size 300 or more",)),
    Bad("tokenizer: cut short", f"{TINY} --tokenizer plain",
        ("the tokenizer 'plain' cannot be loaded: JSONDecodeError",),
        cut("plain/tokenizer.json")),
    Bad("tokenizer: of no text's end", f"{TINY} --tokenizer plain",
        ("has no end-of-text token: set its eos_token",),
        file("plain/tokenizer_config.json", "{}")),
]

RUNS = [
    Bad("run: a file in its place", "train tiny.json --out tiny.json", ("tiny.json cannot be made",
        "choose another --out")),
    Bad("run: a folder of texts", "train tiny.json --out text", ("text is not empty",
        "holds no run: choose another --out")),
    Bad("run: a model's folder", "train tiny.json --out plain",
        ('plain holds no run (no "train" in its config.json)',)),
    again("of fewer steps than are done", "4 steps", given="--steps 3"),
    again("config.json is not JSON", "run/config.json cannot be read", make=file("run/config.json", "{")),
    again("config.json is a list", "run/config.json holds list; expected an object",
        make=file("run/config.json", "[]")),
    again("config.json of no run", 'no "train" in its config.json', make=file("run/config.json", "{}")),
    again("config.json of a number", "it is int; expected an object", make=file("run/config.json",
        '{"train": 3}')),
    again("config.json without end", "run/config.json cannot be read", make=file("run/config.json",
        "[" * 100_000)),
    again("result.json is not JSON", "run/result.json cannot be read", make=cut("run/result.json")),
    again("result.json is a list", "run/result.json holds list; expected an object",
        make=file("run/result.json", "[]")),
    again("result.json of text", "has 'x' as its terminal_val_loss; expected a number: remove it",
          make=field("terminal_val_loss", "x", "run/result.json")),
    again("other processes", "begun with 2 processes and cannot go on with 1", "choose another --out",
          make=both(UNFINISHED, field("processes", 2, "run/config.json"))),
    again("nothing about its text", "the text of the run in run has changed", make=both(UNFINISHED,
        field("data", 3, "run/config.json"))),
    again("another text", "the text of the run in run has changed since it began: restore it",
          make=both(UNFINISHED, file("text/00.txt", "other words"))),
    again("a checkpoint of another model", "is of another model: its hidden_size is None, the run's is 8",
          make=both(UNFINISHED, file("run/checkpoint-4/config.json", "{}"), seal_again)),
    Bad("run: no checkpoint", "eval run", ("no complete checkpoint in",), remove("run/checkpoint-2",
        "run/checkpoint-4")),
    Bad("run: no manifest", "eval run",
        ("checkpoint-2 is not complete (manifest.json is missing, so saving it was interrupted)",),
        remove("run/checkpoint-2/manifest.json", "run/checkpoint-4/manifest.json")),
    Bad("run: a damaged manifest", "eval run/checkpoint-4",
        ("is not a complete checkpoint: manifest.json cannot be read; choose another",),
        cut("run/checkpoint-4/manifest.json")),
    Bad("run: truncated weights", "eval run/checkpoint-4", ("model.safetensors has", "bytes instead of"),
        cut("run/checkpoint-4/model.safetensors")),
    Bad("run: one bit of the weights", "eval run/checkpoint-4",
        ("does not have the checksum it was saved with",),
        flip("run/checkpoint-4/model.safetensors")),
    Bad("run: its text is gone", "eval run", ("there is no file or folder text",), remove("text")),
    Bad("run: its text is another", "eval run", ("has changed since it began: restore it",),
        file("text/00.txt", "other " * 60)),
]
# fmt: on

FILES = [*TEXT_FILES, *TOKENIZERS, *RUNS]
