"""`blockwise-lr inspect`: presets, folders, Hugging Face configurations and functions of the user's own."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig

from support.commands import call

MODELS = """
import torch
from torch import nn

def build():
    gated = nn.Module()
    gated.gate = nn.Parameter(torch.ones(3, 2))
    return nn.ModuleDict({"layer": nn.TransformerEncoderLayer(16, 2, 32), "gated": gated})

def broken():
    raise RuntimeError("no luck")

def number():
    return 3

def large_embedding():
    mlp = nn.ModuleDict({"up_proj": nn.Linear(64, 32, bias=False)})
    nn.init.normal_(mlp["up_proj"].weight, std=0.02)
    return nn.ModuleDict({"wte": nn.Embedding(64, 64), "mlp": mlp})

def zero_head():
    made = large_embedding()
    made["lm_head"] = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(made["lm_head"].weight)
    return made

def copied():
    made = nn.Embedding(8, 4)
    made.weight = nn.Parameter(torch.arange(32.0).reshape(8, 4))
    return made

model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
nothing = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of the user's in the working directory; its name."""
    name = f"models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_hugging_face_folder_needs_no_weights_and_fused_ones_are_named(capsys, tmp_path):
    GPTNeoXConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    for where in (tmp_path, tmp_path / "config.json"):
        code, out, _ = call(capsys, "inspect", str(where))
        assert code == 0
        assert (
            "fused, 2 times: gpt_neox.layers.N.attention.query_key_value.weight holds queries (qk), keys (qk), "
            "values (vo); split_fused turns them into separate parameters"
        ) in out
    assert "gpt_neox.layers.N.attention.query_key_value.weight to qk, 2 times" in out  # what plain names say


def test_a_model_of_70_billion_parameters_is_inspected_without_its_weights(capsys, tmp_path):
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    LlamaConfig(vocab_size=128_256, num_key_value_heads=8, **sizes).save_pretrained(tmp_path)
    code, out, _ = call(capsys, "inspect", str(tmp_path), "--ratios", "emb=3", "--json")
    content = json.loads(out)
    assert code == 0
    assert sum(content["blocks"].values()) == 70_553_706_496
    assert content["blocks"]["qk"] == 80 * 8192 * (8192 + 1024)
    assert content["ratios"] == {"emb": 3, "qk": 1, "vo": 1, "ffn": 1, "norm": 1, "head": 1}
    assert content["initial_rms"] == pytest.approx(dict.fromkeys(content["blocks"], 0.02) | {"norm": 1.0})
    assert content["lr_over_initial_rms"]["emb"] == pytest.approx(3)
    assert content["lr_over_initial_rms"]["norm"] == pytest.approx(0.02)
    assert (content["fused"], content["mistakes_of_plain_names"]) == ({}, {})


def test_a_function_of_ones_own_with_overrides_from_the_command_line_or_a_file(capsys, tmp_path, models):
    code, _, err = call(capsys, "inspect", f"{models}:build")
    assert code == 2
    assert "1 parameter belongs to no block that the rules know: gated.gate shape (3, 2)" in err
    (tmp_path / "overrides.json").write_text('{"gate$": "other"}')
    for given in ("gate$=other", "overrides.json"):
        code, out, _ = call(capsys, "inspect", f"{models}:build", "--blocks", given, "--verbose")
        assert code == 0
        assert 'your override r"gate$"' in out
    code, out, _ = call(capsys, "inspect", f"{models}:model")
    assert code == 0
    assert "emb" in out


def test_a_run_is_inspected_by_its_folder(capsys, tmp_path):
    config = {"train": {"preset": "quickstart"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = call(capsys, "inspect", str(tmp_path / "config.json"), "--json")
    assert code == 0
    assert json.loads(out)["blocks"]["head"] > 0


def test_ratios_can_relate_to_the_initial_scale(capsys, models):
    """An embedding at 1.0 has 50 times the rate of one at 0.02, and its rate over its scale is the ratio again."""
    arguments = ("inspect", f"{models}:large_embedding", "--ratios", "emb=4", "--json")
    plain, related = (json.loads(call(capsys, *arguments, "--relative-to", to)[1]) for to in ("lr", "init"))
    assert (plain["ratios"]["emb"], related["ratios"]["emb"]) == (4, pytest.approx(200))
    assert plain["lr_over_initial_rms"]["emb"] == pytest.approx(0.08)
    assert related["lr_over_initial_rms"]["emb"] == pytest.approx(4)
    assert related["initial_rms"] == pytest.approx({"emb": 1.0, "ffn": 0.02})


def test_a_scale_of_zero_and_one_that_is_not_known_are_said(capsys, models):
    code, out, _ = call(capsys, "inspect", f"{models}:zero_head", "--json")
    assert (code, json.loads(out)["initial_rms"]["head"]) == (0, 0)
    assert json.loads(out)["lr_over_initial_rms"]["head"] is None
    code, out, _ = call(capsys, "inspect", f"{models}:copied", "--json")
    assert (code, json.loads(out)["initial_rms"]) == (0, {"emb": None})
    assert "unknown" in call(capsys, "inspect", f"{models}:copied")[1]


def test_a_layout_that_is_not_known_is_said(capsys, tmp_path, monkeypatch):
    (tmp_path / "unknown_layout.py").write_text(
        "from torch import nn\n"
        "class Attention(nn.Module):\n"
        "    num_heads = 2\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.query_key_value, self.dense = nn.Linear(8, 24), nn.Linear(8, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "inspect", "unknown_layout:Attention")
    assert code == 0
    assert "the layout of this class is not known, so split_fused cannot split it" in out
    assert "qkv" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "inspect needs a model first: a preset, a folder or id of Hugging Face, or module:function"),
        (["{models}:nothing"], ":nothing is a int; expected a model, or a function that returns one"),
        (["{models}:missing"], "expected module:function, such as mymodels.gpt:build"),
        (["nowhere_at_all:f"], "nowhere_at_all:f: No module named 'nowhere_at_all'"),
        (["{models}:broken"], "broken() raised RuntimeError: no luck"),
        (["{models}:number"], "number() returned a int; expected a torch.nn.Module"),
        (["./nowhere"], "'./nowhere' is no folder and no preset"),
        (["."], "holds neither a run nor a model (no config.json)"),
        (["list.json"], "the configuration list.json holds list; expected an object of fields"),
        (["missing.json"], "cannot read the configuration missing.json"),
        (["quickstart", "--ratios", "papper"], "--ratios: 'papper' is no file and none of"),
        (["{models}:zero_head", "--relative-to", "init"], "--relative-to needs the initial scale of head, "),
        (["{models}:zero_head", "--relative-to", "init"], "; leave out --relative-to to show the ratios"),
        (["quickstart", "--blocks", "gate"], "--blocks 'gate' is neither REGEX=BLOCK nor a .json file"),
        (["quickstart", "--blocks", "norm=top"], "--blocks 'norm=top' names 'top', which is no block"),
        (["quickstart", "--blocks", "missing.json"], "cannot read the overrides in missing.json"),
        (["quickstart", "--blocks", "list.json"], 'list.json holds list; expected an object, {"REGEX": "BLOCK", ...}'),
        (["quickstart", "--blocks", "wrong.json"], "wrong.json: 'norm' names 3, which is no block"),
        (["quickstart", "--blocks", "nowhere=other"], 'override r"nowhere" matches no trainable parameter'),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_line(capsys, tmp_path, models, arguments, message):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "wrong.json").write_text('{"norm": 3}')
    code, _, err = call(capsys, "inspect", *(each.format(models=models) for each in arguments))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_the_answer_allocates_nothing(capsys, tmp_path):
    made = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type != "meta" and out.numel() > 100_000:
                made.append((function, out.shape))
            return out

    LlamaConfig(hidden_size=512, vocab_size=32_000, num_hidden_layers=2).save_pretrained(tmp_path)
    with Watch():
        assert call(capsys, "inspect", str(tmp_path))[0] == 0
    assert made == []
