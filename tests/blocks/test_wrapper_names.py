"""What the modules around a model are called, or are, changes no block: only a module's own place may."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockwise_lr.blocks import Block, classify
from support.architectures import build, build_other
from support.attention_free import LSTMLanguageModel
from support.cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = [
    "attn",
    "attention",
    "attention_model",
    "self_attn",
    "qkv",
    "qkv_net",
    "mlp",
    "ffn",
    "feed_forward",
    "experts",
    "router",
    "gate",
    "indexer",
    "norm",
    "head",
    "lm_head",
    "heads",
    "embed",
    "embedding",
    "wpe",
    "position",
    "relative_pos",
    "pooler",
    "projector",
    "multi_modal_projector",
    "quantizer",
    "conv",
    "mamba",
    "ssm",
    "mixer",
    "q",
    "k",
    "v",
    "o",
    "q_proj",
    "out_proj",
    "score",
    "classifier",
    "latent",
    "scale",
    "embeddings",
    "intermediate",
    "output",
    "layer1",
    "module",
]

MODELS: dict[str, Callable[[], nn.Module]] = {case.name: case.build for case in CASES} | {
    "lstm": lambda: LSTMLanguageModel(16),
    **{
        name: lambda name=name: build(name)
        for name in ("mamba", "rwkv", "mixtral", "roberta", "xlm", "qwen3_next")
    },
    "bert for pre-training": lambda: build_other("bert", "PreTraining"),
    "swin": lambda: build_other("swin", "ImageClassification"),
    "t5": lambda: build_other("t5", "Seq2SeqLM"),
    "vit_mae": lambda: build_other("vit_mae", "PreTraining"),
}


class AttnWrapper(nn.Module):
    """Holds a model under some name, and perhaps a matrix beside it."""

    def __init__(self, name: str, model: nn.Module, beside: bool) -> None:
        super().__init__()
        self.add_module(name, model)
        if beside:
            self.unrelated = nn.Linear(3, 5)


class MLPHead(AttnWrapper):
    pass


@cache
def model_of(name: str) -> tuple[nn.Module, dict[str, Block]]:
    with torch.device("meta"):
        model = MODELS[name]()
    return model, dict(classify(model))


WRAPPERS = st.sampled_from([AttnWrapper, MLPHead, nn.ModuleList, nn.ModuleDict])


@pytest.mark.parametrize("model_name", MODELS)
@settings(deadline=None, max_examples=12)
@given(
    wrappers=st.lists(st.tuples(st.sampled_from(NAMES), WRAPPERS), min_size=1, max_size=3),
    beside=st.booleans(),
)
def test_any_wrapper_of_any_name_changes_no_block(model_name: str, wrappers: list, beside: bool) -> None:
    model, expected = model_of(model_name)
    prefix = ""
    for name, wrapper in wrappers:
        if wrapper is nn.ModuleList:
            model, name = nn.ModuleList([model]), "0"
        elif wrapper is nn.ModuleDict:
            model = nn.ModuleDict({name: model})
        else:
            model = wrapper(name, model, beside)
        prefix = f"{name}.{prefix}"
    overrides = (
        {r"(^|\.)unrelated\.": Block.OTHER}
        if any("unrelated" in n for n, _ in model.named_parameters())
        else {}
    )
    blocks = classify(model, overrides)
    assert {name: blocks[f"{prefix}{name}"] for name in expected} == expected
    assert all(name.startswith(prefix) or "unrelated" in name for name in blocks)


def test_an_attention_named_mlp_and_an_mlp_in_a_model_named_attention_keep_their_blocks() -> None:
    class AttentionNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.ModuleDict({"norm": nn.LayerNorm(8), "mlp": nn.ModuleDict({"fc1": nn.Linear(8, 12)})})
            layer["mlp"]["fc2"] = nn.Linear(12, 8)
            self.attention_stack = nn.ModuleList([layer])
            self.stem = nn.Conv2d(3, 8, 4)

    blocks = classify(nn.ModuleDict({"qkv": AttentionNet(), "critic": nn.LayerNorm(3)}))
    assert blocks["qkv.attention_stack.0.mlp.fc1.weight"] is Block.FFN
    assert blocks["qkv.attention_stack.0.mlp.fc2.weight"] is Block.FFN
    assert blocks["qkv.stem.weight"] is Block.CONV


def test_a_convolution_or_mlp_inside_an_attention_is_still_not_taken_for_another() -> None:
    layer = nn.ModuleDict(
        {"norm": nn.LayerNorm(8), "attn": nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(8, 12)})})}
    )
    layer["attn"]["mixing"] = nn.Conv1d(8, 8, 1)
    with pytest.raises(ValueError, match="4 parameters belong") as caught:
        classify(nn.ModuleList([layer, nn.LayerNorm(8)]))
    assert "attn.mlp.fc1.weight" in str(caught.value)
    assert "attn.mixing.weight" in str(caught.value)
