"""Token shards: written once, the same after a kill, refused when damaged."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from blockwise_lr.data import shards as shards_module
from blockwise_lr.data.shards import (
    ShardFile,
    TokenShards,
    load_shards,
    split_of,
    token_dtype,
    verify_shards,
)
from blockwise_lr.data.sources import FileSource
from blockwise_lr.data.tokenize import write_shards
from blockwise_lr.data.vocabulary import END_OF_TEXT, Encoder, train_bpe
from blockwise_lr.errors import UserError

SHARD_CHARACTERS = 20_000
WORDS = ["the", "state", "of", "our", "union", "is", "strong", "\n", "and", "people’s", "work", "goes", "on"]


def corpus(path: Path, n_documents: int) -> FileSource:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(n_documents):
            text = " ".join(draw.choices(WORDS, k=draw.randrange(0, 120)))
            file.write(json.dumps({"text": text}) + "\n")
    return FileSource("words", [path])


def encoder() -> Encoder:
    return Encoder(train_bpe([" ".join(WORDS)] * 20, 300), 0)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    write_shards(
        corpus(tmp_path / "c.jsonl", 400),
        encoder(),
        tmp_path / "built",
        16,
        shard_characters=SHARD_CHARACTERS,
    )
    return tmp_path / "built"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_document_is_in_its_split_in_order_with_its_end(built: Path, tmp_path: Path) -> None:
    tokenizer = encoder()
    splits, header = load_shards(built, tokenizer.sha256)
    texts = list(FileSource("words", [tmp_path / "c.jsonl"]).documents())
    assert len(splits["train"].files) > 3  # the text spans several shards
    for name, shards in splits.items():
        expected = [text for index, text in enumerate(texts) if split_of(index, 16) == name and text]
        tokens = shards.read(0, shards.n_tokens)
        ends = np.flatnonzero(tokens == 0)
        documents = [part[:-1] for part in np.split(tokens, ends + 1)[:-1]]
        plain = Tokenizer.from_str(tokenizer._tokenizer.to_str())
        assert [plain.decode(list(document)) for document in documents] == expected
        assert shards.n_documents == len(expected) == len(ends)
    assert header["dtype"] == "uint16"


def test_splits_take_every_nth_document() -> None:
    names = [split_of(index, 200) for index in range(400)]
    assert {name: names.count(name) for name in set(names)} == {
        "train": 394,
        "tune": 2,
        "val": 2,
        "measure": 2,
    }


def test_tokens_take_two_bytes_up_to_65536_of_them() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_a_vocabulary_beyond_65536_tokens_is_stored_in_four_bytes(tmp_path: Path) -> None:
    words = {f"w{index}": index for index in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{69_000 + i} w5"}) + "\n" for i in range(32)))
    large = Encoder(tokenizer, 0)
    write_shards(FileSource("words", [path]), large, tmp_path / "out", 16)
    splits, header = load_shards(tmp_path / "out", large.sha256)
    assert header["dtype"] == "uint32"
    assert splits["tune"].read(0, 6).tolist() == [69_005, 5, 0, 69_021, 5, 0]


def test_reading_crosses_the_borders_of_files(built: Path) -> None:
    train = load_shards(built, encoder().sha256)[0]["train"]
    whole = np.concatenate([np.fromfile(file.path, "<u2") for file in train.files])
    assert train.n_tokens == len(whole)
    for start, length in ((0, len(whole)), (train.files[0].n_tokens - 3, 7), (len(whole) - 1, 1), (5, 0)):
        np.testing.assert_array_equal(train.read(start, length), whole[start : start + length])
    for start, length in ((-1, 2), (len(whole), 1), (0, len(whole) + 1)):
        with pytest.raises(IndexError, match=f"of a split of {len(whole)}"):
            train.read(start, length)


def test_a_pickled_split_carries_paths_and_not_tokens(built: Path) -> None:
    train = load_shards(built, encoder().sha256)[0]["train"]
    first = train.read(0, 100)
    pickled = pickle.dumps(train)
    assert len(pickled) < 5_000 < train.n_tokens
    np.testing.assert_array_equal(pickle.loads(pickled).read(0, 100), first)


KILLED = """
import sys, pathlib, blockwise_lr.data.tokenize as t
from blockwise_lr.data.sources import FileSource
from blockwise_lr.data.vocabulary import Encoder
from tokenizers import Tokenizer, models, pre_tokenizers
corpus, tokenizer, folder, small = sys.argv[1:]
t.BATCH_CHARACTERS = int(small)
encoder = Encoder(Tokenizer.from_file(tokenizer), 0)
source = FileSource("words", [pathlib.Path(corpus)])
t.write_shards(source, encoder, pathlib.Path(folder), 16, shard_characters=20_000)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_ends_the_same_to_the_byte(tmp_path: Path) -> None:
    source = corpus(tmp_path / "c.jsonl", 8_000)
    tokenizer = train_bpe([" ".join(WORDS)] * 20, 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_shards(source, Encoder(tokenizer, 0), tmp_path / "whole", 16, shard_characters=SHARD_CHARACTERS)

    partial = tmp_path / "killed.partial"
    # Other batches than the uninterrupted run had: where shards end must not depend on them.
    command = [
        sys.executable,
        "-c",
        KILLED,
        *(str(tmp_path / n) for n in ("c.jsonl", "tokenizer.json", "killed")),
    ]
    finished = []
    for _ in range(2):
        child = subprocess.Popen([*command, "700"])
        wanted = (finished[-1] if finished else 0) + 3
        while len(list(partial.glob("train/*.bin"))) <= wanted and child.poll() is None:
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        finished.append(len(json.loads((partial / "progress.json").read_text())))
        assert not (tmp_path / "killed").exists()
    assert 0 < finished[0] < finished[1]
    kept = (partial / "train" / "shard-00000.bin").stat().st_mtime_ns
    write_shards(source, Encoder(tokenizer, 0), tmp_path / "killed", 16, shard_characters=SHARD_CHARACTERS)
    assert (tmp_path / "killed" / "train" / "shard-00000.bin").stat().st_mtime_ns == kept
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not partial.exists()


def test_an_unfinished_shard_that_lost_bytes_is_written_again(tmp_path: Path, built: Path) -> None:
    whole = contents(built)
    header = json.loads(whole["header.json"])
    partial = tmp_path / "again.partial"
    built.rename(partial)
    (partial / "header.json").unlink()
    names = [shard["file"] for shard in header["splits"]["train"]["shards"]]
    records = [
        {
            "first": 0,
            "next": 40 * (k + 1),
            "splits": {"train": {"file": names[k], "tokens": 10**6, "documents": 1}},
        }
        for k in range(2)
    ]
    (partial / "progress.json").write_text(json.dumps(records))
    write_shards(
        FileSource("words", [tmp_path / "c.jsonl"]),
        encoder(),
        tmp_path / "again",
        16,
        shard_characters=SHARD_CHARACTERS,
    )
    assert contents(tmp_path / "again") == whole


@pytest.mark.parametrize(
    "damaged",
    [
        "{}",
        "[1]",
        '[{"plits": 1}]',
        '[{"first": 0, "next": 9, "splits": {"val": {"file": 3}}}]',
        '[{"first": 7, "next": 9, "splits": {}}]',
        '[{"first": 0, "next": 9, "splits": {"vam": {}}}]',
        "[" * 100_000,
    ],
)
def test_a_damaged_record_of_finished_shards_is_made_again(tmp_path: Path, built: Path, damaged: str) -> None:
    whole = contents(built)
    built.rename(tmp_path / "again.partial")
    (tmp_path / "again.partial" / "progress.json").write_text(damaged)
    source = FileSource("words", [tmp_path / "c.jsonl"])
    write_shards(source, encoder(), tmp_path / "again", 16, shard_characters=SHARD_CHARACTERS)
    assert contents(tmp_path / "again") == whole


def test_a_missing_short_or_altered_shard_is_named_with_what_to_do(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = encoder().sha256
    path = built / "val" / "shard-00000.bin"
    data = path.read_bytes()
    advice = f"delete the folder {built} to build it again"

    path.write_bytes(data[:-2])
    with pytest.raises(UserError) as caught:
        load_shards(built, sha256)
    assert str(caught.value) == f"{path} has {len(data) - 2} bytes, expected {len(data)}: {advice}"

    path.unlink()
    with pytest.raises(UserError) as caught:
        load_shards(built, sha256)
    assert str(caught.value) == f"{path} is missing, expected {len(data)} bytes: {advice}"

    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(
        UserError, match=r"val/shard-00000\.bin is corrupt: its sha256 is \w{12}\.\.\., expected \w{12}"
    ):
        load_shards(built, sha256)
    # Above the limit loading compares sizes alone, and verifying finds the flipped bit.
    monkeypatch.setattr(shards_module, "CHECKSUM_LIMIT", 0)
    splits, _ = load_shards(built, sha256)
    with pytest.raises(UserError, match=r"val/shard-00000\.bin is corrupt"):
        verify_shards(splits.values(), advice)


def test_a_header_of_another_tokenizer_or_format_or_cut_short_is_refused(built: Path) -> None:
    sha256 = encoder().sha256
    with pytest.raises(
        UserError, match=f"was written with tokenizer {sha256[:12]}..., expected aaaaaaaaaaaa...: delete"
    ):
        load_shards(built, "a" * 64)
    header = (built / "header.json").read_text()
    (built / "header.json").write_text(header.replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(UserError, match="has shards of format 7, expected 1: delete the folder"):
        load_shards(built, sha256)
    (built / "header.json").write_text(header[:200])
    with pytest.raises(
        UserError, match=r"header\.json cannot be read \(JSONDecodeError.*: delete the folder"
    ):
        load_shards(built, sha256)


def test_a_split_without_any_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": "" if i % 16 == 10 else "words"}) + "\n" for i in range(40)))
    with pytest.raises(
        UserError, match="words: none of the documents of the split val has any text: give more"
    ):
        write_shards(FileSource("words", [path]), encoder(), tmp_path / "out", 16)
    assert not list(tmp_path.glob("out*"))


def test_special_tokens_in_the_text_are_text(tmp_path: Path) -> None:
    tokenizer = encoder()
    (tokens,) = tokenizer.encode([f"a {END_OF_TEXT} b"])
    assert list(tokens).count(0) == 1
    assert tokens[-1] == 0
    assert tokenizer._tokenizer.decode(list(tokens[:-1])) == f"a {END_OF_TEXT} b"


def test_a_truncating_tokenizer_encodes_whole_documents() -> None:
    tokenizer = train_bpe([" ".join(WORDS)] * 20, 300)
    plain = Encoder(tokenizer, 0)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    limited = Encoder(tokenizer, 0)
    assert limited.sha256 == plain.sha256
    np.testing.assert_array_equal(
        limited.encode(["the state of our union"])[0], plain.encode(["the state of our union"])[0]
    )


def test_training_a_bpe_twice_gives_the_same_tokenizer() -> None:
    texts = [" ".join(random.Random(i).choices(WORDS, k=50)) for i in range(50)]
    assert train_bpe(texts, 320).to_str() == train_bpe(texts, 320).to_str()


def test_a_byte_level_tokenizer_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="needs at least 257 tokens, --vocab-size is 256"):
        train_bpe(["text"], 256)


def test_a_run_of_tokens_may_start_inside_a_file(tmp_path: Path) -> None:
    np.arange(10, dtype="<u2").tofile(tmp_path / "a.bin")
    shards = TokenShards("val", [ShardFile(tmp_path / "a.bin", 4, 3)], "<u2", None)
    assert shards.read(0, 4).tolist() == [3, 4, 5, 6]
