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
