"""`blockwise-lr sharpness` as a newcomer meets it: presets, runs, checkpoints and Hugging Face models."""

import json
import math
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from blockwise_lr import SharpnessReport, measure_sharpness
from blockwise_lr.blocks import name_rules
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.data.vocabulary import train_bpe
from blockwise_lr.sharpness.monitor import read_reports
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.presets import get_preset
from blockwise_lr.train.run import train
from blockwise_lr.train.run_sharpness import measure_batches
from conftest import WORDS
from support.commands import call, run_command

FAST = ("--batches", "3", "--device", "cpu")


@pytest.fixture(autouse=True)
def _here(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKWISE_LR_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text, cache):
    """A finished run with three complete checkpoints and one that is not."""
    from blockwise_lr.train.config import ModelConfig, OptimConfig, TrainConfig

    config = TrainConfig(
        steps=12, batch_size=4, log_every=2, eval_every=0, save_every=4, keep_checkpoints=9, eval_tokens=64,
        report_to="none", device="cpu", data=DataConfig(data=str(text), cache=str(cache)),
        model=ModelConfig("gpt2", 16, 2, 2, vocab_size=300, context=16, tied=True),
        optim=OptimConfig(base_lr=1e-2, warmup_fraction=0.1),
    )  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(config, out)
    shutil.copytree(out / "checkpoint-12", out / "checkpoint-16")
    (out / "checkpoint-16" / "manifest.json").unlink()
    return config, out


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders as save_pretrained leaves them."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    bpe = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe([" ".join(WORDS)] * 20, 300), eos_token="<|endoftext|>"
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=24, n_embd=8, n_layer=2, n_head=2))
    gpt2.save_pretrained(folder / "gpt2")
    bpe.save_pretrained(folder / "gpt2")
    gpt2.save_pretrained(folder / "bare")
    (folder / "small").mkdir()
    gpt2.config.vocab_size = 290
    GPT2LMHeadModel(gpt2.config).save_pretrained(folder / "small")
    gpt2.config.vocab_size = 320
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    words = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    by_word = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()
    bert = BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24,
    )  # fmt: skip
    for name, kind in (
        ("bert", BertForMaskedLM),
        ("body", BertModel),
        ("classifier", BertForSequenceClassification),
    ):
        kind(bert).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=by_word, **special).save_pretrained(folder / name)
    t5 = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    return folder


def test_help_says_what_is_measured_and_every_flag(capsys):
    code, out, _ = call(capsys, "sharpness", "--help")
    assert code == 0
    flags = "data tokenizer estimator batches batch-size context probes seed histogram device out blocks"
    assert all(f"--{flag}" in out for flag in flags.split())
    assert "S(b) = tr(H_b) / #(b)" in out
    assert "(default: 16)" in out
    assert "sharpness MODEL" in call(capsys, "--help")[1]


def test_a_run_gives_every_whole_checkpoint_and_the_figure_of_its_evolution(run, tmp_path):
    config, out = run
    done = run_command("sharpness", out, *FAST, "--out", tmp_path / "all", "--histogram")
    assert done.returncode == 0, done.stderr
    assert "step 12, " in done.stdout
    for block in ("emb", "qk", "vo", "ffn", "norm", "pos"):
        assert f"│ {block} " in done.stdout
    assert done.stdout.splitlines()[-1].endswith(
        "all: density.png, evolution.png, layers.png, sharpness.json, sharpness.png"
    )
    said = done.stderr.splitlines()
    assert said[0].startswith("checkpoint-16 is not complete (manifest.json is missing")
    assert said[1:] == [f"measured tiny, step {step}" for step in (4, 8, 12)]
    assert all((tmp_path / "all" / f"{name}.png").stat().st_size > 5000 for name in
               ("sharpness", "layers", "density", "evolution"))  # fmt: skip

    path = tmp_path / "all" / "sharpness.json"
    reports = read_reports(path)
    assert [report.step for report in reports] == [4, 8, 12]
    last = SharpnessReport.from_json(path)
    assert last.step == 12
    assert last.histograms
    about = json.loads(path.read_text())["about"]
    assert about["model"] == "tiny"
    assert about["command"].startswith("blockwise-lr sharpness ")
    assert {"versions", "git_commit", "hardware", "date"} <= set(about)

    # What measure_sharpness says of that checkpoint, on the run's own measure split.
    data = prepare_data(config.data, vocab_size=300, context=16, progress=False)
    assert about["data"] == data.describe()
    model = GPT2LMHeadModel.from_pretrained(out / "checkpoint-12")
    batches = measure_batches(data.measure, 16, batches=3, batch_size=4)
    expected = measure_sharpness(model, batches)
    for block, found in expected.items():
        assert last[block].mean == pytest.approx(found.mean, rel=1e-5)
        assert last[block].stderr == pytest.approx(found.stderr, rel=1e-4)


def test_one_checkpoint_gives_one_report_in_a_folder_of_its_own(run, capsys):
    _, out = run
    code, _, err = call(capsys, "sharpness", out / "checkpoint-8", *FAST, "--estimator", "hutchinson")
    assert code == 0, err
    folder = out / "sharpness" / "checkpoint-8"
    (report,) = read_reports(folder / "sharpness.json")
    assert (report.step, report.estimator, report.batches) == (8, "hutchinson", 3)
    assert not (folder / "evolution.png").exists()
    shutil.rmtree(out / "sharpness")


@pytest.mark.slow
def test_another_text_is_tokenized_with_the_checkpoints_own_tokenizer(run, text, tmp_path, capsys):
    _, out = run
    shutil.copytree(text, tmp_path / "copy")
    for name, data in (("own", ()), ("copy", ("--data", tmp_path / "copy"))):
        code, _, err = call(capsys, "sharpness", out, *FAST, "--out", tmp_path / name, *data)
        assert code == 0, err
    own, copy = (SharpnessReport.from_json(tmp_path / name / "sharpness.json") for name in ("own", "copy"))
    assert own == copy
    about = json.loads((tmp_path / "copy" / "sharpness.json").read_text())["about"]
    assert about["data"]["tokenizer"] == str(out / "checkpoint-12")
    assert about["data"]["source"] == str(tmp_path / "copy")


def test_a_preset_is_measured_at_initialisation(monkeypatch, text, cache, capsys, tmp_path):
    from blockwise_lr.train import presets

    tiny = replace(get_preset("quickstart"), model=replace(get_preset("quickstart").model, vocab_size=300))
    tiny = replace(tiny, data=DataConfig(data=str(text)))
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "quickstart": tiny})
    code, out, err = call(capsys, "sharpness", "quickstart", *FAST, "--batch-size", "1", "--seed", "3")
    assert code == 0, err
    assert "runs/sharpness-quickstart: layers.png, sharpness.json, sharpness.png" in out
    report = SharpnessReport.from_json(tmp_path / "runs/sharpness-quickstart/sharpness.json")
    assert report.step is None
    data = prepare_data(tiny.data, vocab_size=300, context=128, progress=False)
    batches = measure_batches(data.measure, 128, batches=3, batch_size=1)
    expected = measure_sharpness(build_model(tiny.model, seed=3), batches, seed=3)
    assert report["vo"].mean == pytest.approx(expected["vo"].mean, rel=1e-5)


def test_a_hugging_face_folder_is_measured_with_its_own_tokenizer(hub, text, tmp_path, capsys):
    code, out, err = call(capsys, "sharpness", hub / "gpt2", "--data", text, *FAST)
    assert code == 0, err
    assert "runs/sharpness-gpt2: " in out
    report = SharpnessReport.from_json(tmp_path / "runs/sharpness-gpt2/sharpness.json")
    assert report.samples == 3 * 4 * 23  # windows of 24 tokens, the longest it takes, predict 23
    assert "transformer.h.0.attn.c_attn.weight:q" in report.per_parameter
    code, _, err = call(
        capsys, "sharpness", hub / "bare", "--data", text, *FAST, "--tokenizer", hub / "gpt2", "--out", "bare"
    )
    assert code == 0, err
    assert SharpnessReport.from_json(tmp_path / "bare" / "sharpness.json") == report


def test_a_masked_language_model_predicts_what_is_hidden(hub, text, tmp_path, capsys):
    command = ("sharpness", hub / "bert", "--data", text, *FAST)
    code, _, err = call(capsys, *command)
    assert code == 0, err
    report = SharpnessReport.from_json(tmp_path / "runs/sharpness-bert/sharpness.json")
    tokens = 3 * 4 * 22  # [CLS] and [SEP] are two of a window's 24
    assert 0.05 * tokens < report.samples < 0.3 * tokens
    assert report["vo"].numel == 2 * 2 * (8 * 8 + 8)
    assert call(capsys, *command, "--out", "again")[0] == 0
    again = SharpnessReport.from_json(tmp_path / "again" / "sharpness.json")
    assert {b: e.mean for b, e in again.items()} == {b: e.mean for b, e in report.items()}


@pytest.mark.slow
def test_figures_of_an_earlier_measurement_do_not_stay(run, capsys):
    _, out = run
    assert call(capsys, "sharpness", out, *FAST, "--histogram")[0] == 0
    assert {p.name for p in (out / "sharpness").iterdir()} >= {"density.png", "evolution.png"}
    assert call(capsys, "sharpness", out, "--batches", "1", "--probes", "2")[0] == 0
    assert not (out / "sharpness" / "density.png").exists()
    (first, *_, last) = read_reports(out / "sharpness" / "sharpness.json")
    assert (first.probes, last.stderr_over) == (2, "probes")
    assert not math.isnan(last["qk"].stderr)
    shutil.rmtree(out / "sharpness")


class TestBadInput:
    @pytest.fixture
    def refused(self, capsys):
        def check(message, *arguments):
            code, _, err = call(capsys, "sharpness", *arguments)
            assert code == 2, err
            assert err.startswith("blockwise-lr: ")
            assert message in err
            assert err.count("\n") == 1

        return check

    def test_no_model(self, refused):
        refused("MODEL")
        refused("Perhaps you meant: --batches", "quickstart", "--batchs", "3")
        refused("invalid choice 'optimizer'", "quickstart", "--estimator", "optimizer")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--batches", "0"), "--batches is 0; expected 1 or more"),
            (("--batch-size", "0"), "--batch-size is 0; expected 1 or more"),
            (("--context", "1"), "--context is 1; expected 2 or more"),
            (("--probes", "0"), "--probes is 0; expected 1 or more"),
            (("--seed", "-1"), "--seed is -1; expected 0 or more"),
            (("--seed", str(10**20)), f"--seed is {10**20}; expected 0 or more, 4294967295 at most"),
            (
                ("--text-field", "words"),
                "--text-field words is for --data; the model's own text has its field",
            ),
            (
                ("--estimator", "empirical", "--probes", "2"),
                "--probes is 2, but --estimator empirical draws nothing at random",
            ),
            (("--estimator", "hutchinson", "--histogram"), "--estimator hutchinson has none"),
            (
                ("--blocks", "transform"),
                "--blocks 'transform' is neither REGEX=BLOCK nor a .json file of such pairs",
            ),
            (
                ("--blocks", "transform=top"),
                "--blocks 'transform=top' names 'top', which is no block; the blocks are emb",
            ),
        ],
    )
    def test_a_setting_out_of_range(self, refused, flags, message):
        refused(message, "quickstart", *flags)

    def test_nothing_of_that_name(self, refused, tmp_path):
        refused("no folder no/such/folder: expected the folder of a run, of a checkpoint", "no/such/folder")
        refused(
            "'nobody/nothing' is no folder and no preset (`blockwise-lr presets` lists those); as a model it cannot",
            "nobody/nothing",
        )
        (tmp_path / "file").write_text("")
        refused("no folder file: expected", "file")
        (tmp_path / "empty").mkdir()
        refused("empty holds neither a run nor a model (no config.json)", "empty")
        (tmp_path / "empty" / "checkpoint-5").mkdir()
        refused("(no config.json); name one of its checkpoints, such as empty/checkpoint-5", "empty")

    def test_a_folder_whose_config_json_is_broken(self, refused, tmp_path):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text("{")
        refused("config.json cannot be read", "broken")
        (tmp_path / "broken" / "config.json").write_text('{"model_type": "unheard-of"}')
        refused("the model in broken cannot be loaded: ValueError: The checkpoint you are", "broken")

    def test_a_run_without_whole_checkpoints(self, refused, run, tmp_path):
        _, out = run
        shutil.copytree(out, tmp_path / "run")
        refused(
            "checkpoint-16 is not a complete checkpoint: manifest.json is missing",
            tmp_path / "run" / "checkpoint-16",
        )
        for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
            (checkpoint / "manifest.json").unlink(missing_ok=True)
        refused(
            "no complete checkpoint in run; checkpoint-4 is not complete (manifest.json is missing", "run"
        )
        for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        refused("no complete checkpoint in run", "run")

    def test_a_run_whose_text_has_changed(self, refused, run, text, tmp_path):
        _, out = run
        shutil.copytree(out, tmp_path / "run")
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        config["data"]["content_sha256"] = "0"
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        refused("the text of the run in run has changed since it began", "run")

    def test_too_little_text(self, refused, run, hub, tmp_path):
        _, out = run
        refused(
            "1000 batches of 4 windows to measure sharpness on are 4000, but the split",
            out,
            "--batches",
            "1000",
        )
        refused("there is no file or folder", hub / "gpt2", "--data", "./nowhere")
        (tmp_path / "one.txt").write_text("one document " * 100)
        refused("1 documents cannot be split into train", hub / "gpt2", "--data", "one.txt")

    def test_longer_windows_than_the_model_takes(self, refused, hub, run):
        refused("--context is 25; gpt2 takes windows of at most 24 tokens", hub / "gpt2", "--context", "25")
        refused("--context is 17; tiny takes windows of at most 16 tokens", run[1], "--context", "17")

    def test_a_tokenizer_that_is_missing_or_another_models(self, refused, hub, text):
        refused(
            "bare comes without a tokenizer (tokenizer.json): name the one it was trained with, --tokenizer",
            hub / "bare", "--data", text,
        )  # fmt: skip
        refused(
            "holds no tokenizer (tokenizer.json)", hub / "bare", "--data", text, "--tokenizer", hub / "t5"
        )
        refused(
            "the tokenizer 'nobody/nothing' cannot be loaded", hub / "gpt2", "--tokenizer", "nobody/nothing"
        )
        refused(
            "tokens, the model's vocabulary is 32\n",
            hub / "bert", "--data", text, "--tokenizer", hub / "gpt2",
        )  # fmt: skip

    def test_a_masked_model_with_a_tokenizer_that_hides_nothing(self, refused, hub, text, tmp_path):
        shutil.copytree(hub / "bert", tmp_path / "bert")
        config = json.loads((tmp_path / "bert" / "tokenizer_config.json").read_text())
        del config["mask_token"]
        (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(config))
        refused("a masked language model needs a tokenizer with a mask token", "bert", "--data", text)
        refused("--context is 2; expected 3 or more", hub / "bert", "--data", text, "--context", "2")

    def test_a_model_of_another_kind(self, refused, hub, text):
        refused("is a T5ForConditionalGeneration: expected a causal or a masked language model", hub / "t5")
        refused("is a BertForSequenceClassification: expected a causal", hub / "classifier")
        refused(
            "has no weights for cls.predictions.bias and 5 others of BertForMaskedLM; expected all of them",
            hub / "body", "--data", text,
        )  # fmt: skip

    def test_a_parameter_that_no_rule_knows_is_named_with_the_flag_to_give(
        self, refused, hub, text, tmp_path, monkeypatch
    ):
        sizes = {"hidden_size": 8, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        config = OPTConfig(vocab_size=320, word_embed_proj_dim=4, max_position_embeddings=24, **sizes)
        OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
        command = ("opt", "--tokenizer", hub / "gpt2", "--data", text)
        monkeypatch.setattr(name_rules, "NAMES", ())  # as before these projections had a line of their own
        refused("on the command line: --blocks 'REGEX=BLOCK' ...", *command)
        refused("model.decoder.project_out.weight", *command, "--blocks", "project_in=other")
        refused(
            'override r"nothing" matches no trainable', hub / "gpt2", "--data", text, "--blocks", "nothing=vo"
        )

    def test_a_model_whose_weights_are_not_finite(self, refused, hub, text, tmp_path):
        model = GPT2LMHeadModel.from_pretrained(hub / "gpt2")
        with torch.no_grad():
            model.transformer.h[0].attn.c_proj.weight[0, 0] = math.nan
        shutil.copytree(hub / "gpt2", tmp_path / "nan")
        model.save_pretrained(tmp_path / "nan")
        refused("the logits are not finite (NaN or inf)", "nan", "--data", text)

    def test_a_folder_that_cannot_be_written(self, refused, hub, text, tmp_path):
        (tmp_path / "file").write_text("")
        refused("cannot be made (Not a directory): choose another --out",
                hub / "gpt2", "--data", text, "--out", "file/out")  # fmt: skip

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_a_gpu_where_there_is_none(self, refused):
        refused("--device cuda, but torch sees no GPU here", "quickstart", "--device", "cuda")
