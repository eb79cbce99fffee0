"""Documents out of every format, and what a broken file says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.sources import HuggingFaceSource, open_source
from blockwise_lr.errors import UserError

TEXTS = [f"Document {i}.\nA line with “quotes” and \u2028 a separator.\n" for i in range(20)]


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        # Two frames one after the other, as parallel compressors write them.
        half = len(lines.encode()) // 2
        codec = pa.Codec("zstd")
        parts = lines.encode()[:half], lines.encode()[half:]
        path.write_bytes(b"".join(codec.compress(part, asbytes=True) for part in parts))
    elif path.suffix == ".parquet":
        table = pa.table({"id": list(range(len(texts))), "text": texts})
        pq.write_table(table, path, row_group_size=7)
    else:
        path.write_text(lines, "utf-8")
    return path


def documents(data: Path | str, **options: object) -> list[str]:
    return list(open_source(DataConfig(data=str(data), **options)).documents())  # type: ignore[arg-type]


def test_the_embedded_text_is_249_speeches_in_chronological_order() -> None:
    source = open_source(DataConfig())
    speeches = list(source.documents())
    assert source.n_documents() == len(speeches) == 249
    assert speeches[0].startswith("Fellow-Citizens of the Senate and House of Representatives:")
    assert sum(len(speech.encode()) for speech in speeches) == 12_185_751


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_row_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    assert documents(path) == TEXTS
    assert documents(path, max_documents=3) == TEXTS[:3]
    assert list(open_source(DataConfig(data=str(path))).documents(17)) == TEXTS[17:]
    assert list(open_source(DataConfig(data=str(path), max_documents=18)).documents(17)) == TEXTS[17:18]


def test_a_folder_and_a_glob_read_text_files_in_order_of_their_paths(tmp_path: Path) -> None:
    for name, text in (("b/2.txt", "three"), ("a.txt", "one"), ("b/1.txt", "two"), (".hidden/x.txt", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert documents(tmp_path) == ["one", "two", "three"]
    assert documents(tmp_path / "b" / "*.txt") == ["two", "three"]
    assert open_source(DataConfig(data=str(tmp_path))).n_documents() == 3


def test_an_empty_text_keeps_its_index(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": null}\n{"text": ""}\n{"text": "b"}\n')
    assert documents(path) == ["a", "", "", "b"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert documents(path) == ["a ? b", "\U0001f600"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_hugging_face_data_set_is_read_through_load_dataset(
    suffix: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write(tmp_path / "data" / f"train-00000-of-00001.{suffix}").parent
    write(tmp_path / "data" / f"validation-00000-of-00001.{suffix}", ["held out"])
    source = HuggingFaceSource(str(folder), streaming=streaming)
    assert list(source.documents()) == TEXTS
    assert list(source.documents(15)) == TEXTS[15:]
    assert source.n_documents() == (None if streaming else 20)
    assert (
        list(HuggingFaceSource(str(folder), streaming=streaming, max_documents=4).documents(2)) == TEXTS[2:4]
    )
    with pytest.raises(
        UserError, match=r"no field 'content'; the fields are id, text: choose one with --text-field"
    ):
        list(HuggingFaceSource(str(folder), streaming=streaming, text_field="content").documents())


def test_an_id_is_a_hugging_face_data_set_and_its_identity_needs_no_network() -> None:
    source = open_source(DataConfig(data="allenai/c4", hf_config="en", hf_streaming=True))
    assert source.identity() == {
        "kind": "huggingface",
        "id": "allenai/c4",
        "config": "en",
        "text_field": "text",
    }


def test_a_data_set_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = open_source(DataConfig(data="nobody-here/no-such-data"))
    message = (
        r"^'nobody-here/no-such-data' is no file or folder, and as a Hugging Face data set \(configuration "
    )
    with pytest.raises(UserError, match=message) as caught:
        source.n_documents()
    assert "\n" not in str(caught.value)


def test_a_data_set_without_a_train_split_names_its_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write(tmp_path / "data" / "test-00000-of-00001.parquet").parent
    with pytest.raises(UserError, match="has no split train; it has test"):
        HuggingFaceSource(str(folder)).n_documents()


def test_a_data_set_with_a_loading_script_is_read_from_its_parquet_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    script = tmp_path / "scripted" / "scripted.py"
    script.parent.mkdir()
    script.write_text("raise SystemExit('a loading script must never run')")
    copy = write(tmp_path / "copy" / "train-00000-of-00001.parquet").parent
    load = datasets.load_dataset

    def with_branches(name: str, *args: object, revision: str | None = None, **options: object) -> object:
        # A local folder has no branches: stand in for the Hub's alone, the refusal of the script is real.
        return load(str(copy) if revision == "refs/convert/parquet" else name, *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", with_branches)
    assert list(HuggingFaceSource(str(script.parent)).documents()) == TEXTS


def test_a_path_that_is_not_there_is_not_taken_for_an_id(tmp_path: Path) -> None:
    for data in (str(tmp_path / "no"), "./no", "corpus.jsonl", "a/b/c"):
        with pytest.raises(
            UserError, match=f"there is no file or folder {data}, and it is not a Hugging Face"
        ):
            open_source(DataConfig(data=data))
    with pytest.raises(UserError, match=r"no file matches .*\*\.txt"):
        open_source(DataConfig(data=str(tmp_path / "*.txt")))
    with pytest.raises(
        UserError, match=r"holds no \.txt, \.jsonl, \.jsonl\.gz, \.jsonl\.zst or \.parquet file"
    ):
        open_source(DataConfig(data=str(tmp_path)))
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(UserError, match=r"a\.csv has a format that is not supported: expected \.txt"):
        open_source(DataConfig(data=str(tmp_path / "a.csv")))
    with pytest.raises(UserError, match="--max-documents is 0, expected at least 1"):
        open_source(DataConfig(max_documents=0))


def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text \(byte 2\): convert it first"):
        documents(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not JSON .*; expected one object a line"):
        documents(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"id": 1, "content": "a"}\n')
    with pytest.raises(
        UserError, match=r"b\.jsonl, line 1: no field 'text'; the fields are id, content: choose one"
    ):
        documents(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match=r"c\.jsonl, line 1: the field 'text' holds int, expected text"):
        documents(tmp_path / "c.jsonl")
    (tmp_path / "d.parquet").write_text("no")
    with pytest.raises(UserError, match=r"d\.parquet is not a parquet file"):
        documents(tmp_path / "d.parquet")
    write(tmp_path / "e.jsonl.gz")
    (tmp_path / "e.jsonl.gz").write_bytes((tmp_path / "e.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"e\.jsonl\.gz is cut short or corrupt"):
        documents(tmp_path / "e.jsonl.gz")
    write(tmp_path / "f.jsonl.zst")
    (tmp_path / "f.jsonl.zst").write_bytes((tmp_path / "f.jsonl.zst").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"f\.jsonl\.zst is cut short or corrupt"):
        documents(tmp_path / "f.jsonl.zst")
    with pytest.raises(UserError, match=r"no field 'body'; the fields are id, text"):
        documents(write(tmp_path / "g.parquet"), text_field="body")


def test_the_identity_follows_the_documents_and_not_the_place(tmp_path: Path) -> None:
    first, copy, other = (write(tmp_path / name / "x.jsonl") for name in "abc")
    other.write_text(other.read_text("utf-8").replace("Document 3", "Document 33"), "utf-8")
    identities = [open_source(DataConfig(data=str(path))).identity() for path in (first, copy, other)]
    assert identities[0] == identities[1] != identities[2]
