"""Files as they lie on people's disks: links, capitals, byte order marks, long windows, names that are no text."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.data.sources import HuggingFaceSource, open_source
from blockwise_lr.data.vocabulary import load_tokenizer
from blockwise_lr.errors import UserError

TEXTS = [f"Document {i} “quoted”" for i in range(20)]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def documents(data: Path | str) -> list[str]:
    return list(open_source(DataConfig(data=str(data))).documents())


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(path: Path, mark: bytes = b"") -> Path:
    """TEXTS in the format of the file's ending, behind a byte order mark of the text."""
    lines, kind = mark + LINES.encode(), path.suffix.lower()
    if kind == ".parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        first = mark.decode() + TEXTS[0]
        with path.open("wb") as file:  # pyarrow takes no name that is not UTF-8
            pq.write_table(pa.table({"text": [first, *TEXTS[1:]]}), file)
        return path
    packed = {".gz": gzip.compress, ".zst": lambda b: pa.compress(b, codec="zstd", asbytes=True)}
    return write(path, packed.get(kind, bytes)(lines))


ROWS = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet")


class TestLinks:
    def test_to_folders_and_files_are_followed(self, tmp_path: Path) -> None:
        write(tmp_path / "elsewhere" / "b.txt", "linked folder")
        write(tmp_path / "elsewhere" / "deep" / "c.txt", "below it")
        write(tmp_path / "other" / "blob", "linked file")
        data = write(tmp_path / "data" / "z.txt", "own").parent
        (data / "m").symlink_to("../elsewhere")
        (data / "a.txt").symlink_to(tmp_path / "other" / "blob")
        assert documents(data) == ["linked file", "linked folder", "below it", "own"]
        (tmp_path / "link").symlink_to(data)
        assert documents(tmp_path / "link") == documents(data)

    def test_that_lead_in_a_circle_end(self, tmp_path: Path) -> None:
        data = write(tmp_path / "data" / "sub" / "a.txt", "a").parents[1]
        (data / "sub" / "up").symlink_to("..")
        (data / "self").symlink_to(".")
        (data / "sub" / "other").symlink_to(tmp_path)
        assert documents(data) == ["a"]
        assert documents(f"{data}/**/*.txt") == ["a"]

    def test_to_a_file_that_is_there_too_count_once(self, tmp_path: Path) -> None:
        data = write(tmp_path / "b.txt", "once").parent
        (data / "a.txt").symlink_to("b.txt")
        (data / "c").symlink_to(".")
        assert documents(data) == ["once"]
        assert open_source(DataConfig(data=str(data))).n_documents() == 1
        assert documents(f"{data}/*.txt") == ["once"]
        os.link(data / "b.txt", data / "d.txt")  # a second name is a second document, like a copy
        assert documents(data) == ["once", "once"]

    def test_to_nothing_are_named(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", "a")
        (tmp_path / "b.txt").symlink_to("gone.txt")
        with pytest.raises(UserError, match=r"b\.txt is a link to gone\.txt, which is not there: restore it"):
            documents(tmp_path)
        (tmp_path / "b.txt").unlink()
        (tmp_path / "b.txt").symlink_to("b.txt")
        with pytest.raises(UserError, match=r"b\.txt is a link to b\.txt, which is not there"):
            documents(tmp_path)
        (tmp_path / "b.txt").unlink()
        (tmp_path / "more").symlink_to("not-mounted")
        with pytest.raises(UserError, match=r"more is a link to not-mounted, which is not there"):
            documents(tmp_path)
        (tmp_path / "more").unlink()
        for name in (".#a.txt", "notes.md"):  # an editor's lock; another format
            (tmp_path / name).symlink_to("nothing")
        assert documents(tmp_path) == ["a"]

    @pytest.mark.parametrize("pattern", ["*", "*.txt", "**/*.txt"])
    def test_to_nothing_are_named_in_a_glob_too(self, tmp_path: Path, pattern: str) -> None:
        write(tmp_path / "a.txt", "a")
        (tmp_path / "b.txt").symlink_to("gone.txt")
        with pytest.raises(UserError, match=r"b\.txt is a link to gone\.txt, which is not there: restore it"):
            documents(tmp_path / pattern)
        (tmp_path / "b.txt").unlink()
        for name in (".#a.txt", "notes.md", "loop.md"):
            (tmp_path / name).symlink_to("loop.md")
        assert documents(tmp_path / "**/*.txt") == ["a"]

    def test_to_a_folder_that_is_gone_are_named_in_a_glob_too(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", "a")
        (tmp_path / "more").symlink_to("not-mounted")
        with pytest.raises(UserError, match=r"more is a link to not-mounted, which is not there"):
            documents(tmp_path / "**/*.txt")
        assert documents(tmp_path / "*.txt") == ["a"]

    def test_nanogpts_bins_may_be_links(self, tmp_path: Path) -> None:
        blob = write(tmp_path / "blob", bytes(2000))
        (tmp_path / "nano").mkdir()
        for name in ("train.bin", "val.bin"):
            (tmp_path / "nano" / name).symlink_to(blob)
        data = prepare_data(DataConfig(data=str(tmp_path / "nano")), vocab_size=8, context=4)
        assert data.train.n_tokens == 1000


class TestCapitals:
    @pytest.mark.parametrize("name", ["A.TXT", "a.Txt", *(name.upper() for name in ROWS), "A.jsonl.GZ"])
    def test_the_ending_in_capitals_is_the_same_format(self, tmp_path: Path, name: str) -> None:
        if name.lower().endswith(".txt"):
            write(tmp_path / name, "text")
            expected = ["text"]
        else:
            write_rows(tmp_path / name)
            expected = TEXTS
        assert (
            documents(tmp_path) == documents(tmp_path / name) == documents(f"{tmp_path}/[aA].*") == expected
        )
        count = open_source(DataConfig(data=str(tmp_path))).n_documents()
        assert count == (len(expected) if name.lower().endswith((".txt", ".parquet")) else None)

    def test_two_names_that_differ_in_capitals_are_two_files(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", "small")
        write(tmp_path / "A.TXT", "large")
        if len(list(tmp_path.iterdir())) == 1:
            pytest.skip("this file system takes them for one")
        assert documents(tmp_path) == ["large", "small"]

    def test_such_a_name_that_is_not_there_is_no_data_set_id(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"there is no file or folder CORPUS\.TXT"):
            open_source(DataConfig(data="CORPUS.TXT"))
        assert isinstance(open_source(DataConfig(data="Owner/Corpus")), HuggingFaceSource)

    def test_the_cache_entry_of_a_copy_is_the_same(self, tmp_path: Path) -> None:
        sources = [
            write_rows(tmp_path / folder / name) for folder, name in (("a", "x.jsonl"), ("b", "X.JSONL"))
        ]
        first, second = (open_source(DataConfig(data=str(path))).identity() for path in sources)
        assert first == second


class TestByteOrderMark:
    @pytest.mark.parametrize("name", ROWS)
    def test_of_a_row_format_is_no_text(self, tmp_path: Path, name: str) -> None:
        assert documents(write_rows(tmp_path / name, codecs.BOM_UTF8)) == TEXTS

    def test_of_a_text_is_no_text(self, tmp_path: Path) -> None:
        content = codecs.BOM_UTF8 + "first\r\nsecond \ufeff third".encode()
        assert documents(write(tmp_path / "a.txt", content)) == ["first\nsecond \ufeff third"]
        assert documents(write(tmp_path / "b.txt", codecs.BOM_UTF8)) == [""]

    def test_of_files_put_together_are_no_text(self, tmp_path: Path) -> None:
        part = codecs.BOM_UTF8 + LINES.replace("\n", "\r\n").encode()
        path = write(tmp_path / "a.jsonl.gz", gzip.compress(part) + gzip.compress(part))
        assert documents(path) == TEXTS * 2

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
    def test_of_another_encoding_says_which_and_how_to_convert(
        self, tmp_path: Path, name: str, encoding: str
    ) -> None:
        content = ("\ufeff" + LINES).encode(encoding)
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
        kind = encoding[:6].upper()
        with pytest.raises(
            UserError, match=rf"{name} is {kind} text, by its .* iconv -f {kind} -t UTF-8"
        ) as e:
            documents(tmp_path / name)
        if not name.endswith(".gz") and shutil.which("iconv"):
            command = (
                str(e.value).partition(" with ")[2].replace("NEW-FILE", shlex.quote(str(tmp_path / "new")))
            )
            subprocess.run(["bash", "-c", command], check=True)
            assert (tmp_path / "new").read_text("utf-8").lstrip("\ufeff") == LINES

    def test_of_a_configuration_is_skipped(self, tmp_path: Path) -> None:
        from blockwise_lr.analysis.block_overrides import read_overrides
        from blockwise_lr.train.ratio_text import parse_ratios
        from blockwise_lr.train.run_folder import read_configuration

        path = write(tmp_path / "a.JSON", codecs.BOM_UTF8 + b'{"emb": "norm"}')
        assert read_configuration(path) == {"emb": "norm"}
        assert read_overrides([str(path)]) == {"emb": "norm"}
        assert parse_ratios(str(write(path, codecs.BOM_UTF8 + b'{"emb": 2}'))) == {"emb": 2}


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the program zstd")
class TestLongWindow:
    def compressed(self, path: Path, window: int, content: str = LINES) -> Path:
        """By way of a pipe, so that zstd does not know the size and takes the whole window."""
        command = ["zstd", "-q", "-f", f"--long={window}", "-o", str(path)]
        subprocess.run(command, input=content.encode(), check=True)
        return path

    @pytest.mark.parametrize("window", [27, 28, 31])
    def test_is_read(self, tmp_path: Path, window: int) -> None:
        if sys.version_info < (3, 14):
            pytest.importorskip("backports.zstd")
        path = self.compressed(tmp_path / "a.jsonl.zst", window)
        assert documents(path) == TEXTS
        path.write_bytes(path.read_bytes() * 2)
        assert documents(path) == TEXTS * 2
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match=r"a\.jsonl\.zst is cut short or corrupt"):
            documents(path)

    def test_without_the_library_says_what_to_install_or_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("compression.zstd", "backports.zstd"):
            monkeypatch.setitem(sys.modules, name, None)
        assert documents(self.compressed(tmp_path / "b.jsonl.zst", 27)) == TEXTS
        path = self.compressed(tmp_path / "a.jsonl.zst", 28)
        with pytest.raises(UserError, match=r"window above 128 MiB .*: pip install backports\.zstd") as error:
            documents(path)
        command = (
            str(error.value).partition("again: ")[2].replace("NEW-FILE", str(tmp_path / "new.jsonl.zst"))
        )
        subprocess.run(["bash", "-c", command], check=True, capture_output=True)
        assert documents(tmp_path / "new.jsonl.zst") == TEXTS


class TestEmpty:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
    def test_a_file_of_no_bytes_has_no_documents(self, tmp_path: Path, name: str) -> None:
        assert documents(write(tmp_path / name)) == []

    def test_a_text_of_no_bytes_keeps_its_index(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt")
        write(tmp_path / "b.txt", "b")
        assert documents(tmp_path) == ["", "b"]

    def test_a_parquet_of_no_bytes_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"a\.parquet is not a parquet file"):
            documents(write(tmp_path / "a.parquet"))


class TestNamesThatAreNotText:
    @pytest.mark.parametrize("ending", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
    def test_are_read_cached_and_described(self, tmp_path: Path, ending: str) -> None:
        folder = tmp_path / NOT_UTF8
        rng = random.Random(0)
        words = [" ".join(rng.choices(["war", "peace", "law", "people"], k=200)) for _ in range(16)]
        if ending == ".txt":
            for i, text in enumerate(words):
                write(folder / f"{NOT_UTF8}{i:02}.txt", text)
        else:
            write_rows(folder / f"{NOT_UTF8}{ending}")
            words = TEXTS
        assert documents(folder) == words
        data = DataConfig(data=str(folder), cache=str(tmp_path / "cache"))
        first = prepare_data(data, vocab_size=300, context=4, progress=False)
        again = prepare_data(data, vocab_size=300, context=4, progress=False)
        assert first.describe() == again.describe()
        assert json.loads(json.dumps(first.describe()))["source"] == str(folder)

    def test_of_a_cache_a_tokenizer_or_a_model_are_refused(self, tmp_path: Path, text: Path) -> None:
        from blockwise_lr.analysis.saved_models import find_model

        folder = tmp_path / NOT_UTF8
        folder.mkdir()
        config = DataConfig(data=str(text), cache=str(folder))
        with pytest.raises(
            UserError, match=r"the cache folder '.*caf\\udce9' is not text in the encoding of file"
        ):
            prepare_data(config, vocab_size=300, context=4)
        config = DataConfig(data=str(text), cache=str(tmp_path / "c"), tokenizer=str(folder))
        with pytest.raises(UserError, match="--tokenizer '.*' is not text .* utf-8: give it another name$"):
            prepare_data(config, vocab_size=300, context=4)
        with pytest.raises(UserError, match="the model's folder '.*' is not text"):
            find_model(folder)


def test_what_the_system_does_not_let_us_read_is_one_line(tmp_path: Path) -> None:
    long = "x" * 300
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\): check the path"):
        open_source(DataConfig(data=str(tmp_path / long)))
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\): check the path"):
        load_tokenizer(long, 300)
    with pytest.raises(
        UserError, match=r"~nobody-of-that-name/text cannot be found .*: give the path without ~"
    ):
        open_source(DataConfig(data="~nobody-of-that-name/text"))
