"""Output heads of vocabularies as small as the model is wide, and of models that have no attention."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import nn

from blockwise_lr.blocks import Block, classify
from support import architectures
from support.architectures import CAUSAL, build
from support.attention_free import (
    WIDTH,
    LanguageModel,
    LSTMLanguageModel,
    MixerLayer,
    StateSpaceLayer,
    StateSpaceMixer,
)
from support.proofs import UNBUILDABLE

pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = (
    "mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "jamba", "zamba", "zamba2", "bamba", "gpt2",
    "llama", "xlm", "xlnet", "opt", "big_bird", "blt", "gemma3n_text", "longcat_flash", "rembert",
)  # fmt: skip


def blocks_at(model_type: str, vocabulary: int) -> dict[str, Block]:
    """The blocks of the tiny model with so many tokens."""
    sizes = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), vocabulary)
    with patch.dict(architectures.SMALL, sizes), torch.device("meta"):
        return dict(classify(build(model_type)))


def same_at_every_vocabulary(model_type: str) -> None:
    expected = blocks_at(model_type, 101)
    for vocabulary in (32, 64, 128):  # the model's width, that of its feed-forward or mixer, and twice that
        assert blocks_at(model_type, vocabulary) == expected, vocabulary


@pytest.mark.parametrize("model_type", QUICK)
def test_a_vocabulary_as_large_as_a_width_changes_no_block(model_type: str) -> None:
    same_at_every_vocabulary(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in {*UNBUILDABLE, *QUICK}])
def test_a_vocabulary_as_large_as_a_width_changes_no_block_of_any_model(model_type: str) -> None:
    same_at_every_vocabulary(model_type)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("vocabulary", [WIDTH, 2 * WIDTH, 40])
@pytest.mark.parametrize(("layer", "inside"), [(MixerLayer, "ffn"), (StateSpaceLayer, "ssm")])
def test_layers_without_attention_hold_no_head(layer, inside: str, vocabulary: int, depth: int) -> None:
    blocks = classify(LanguageModel(layer, vocabulary, depth))
    found = {"emb": {"a.weight"}, "head": {"d.weight", "d.bias"}, inside: set(), "norm": set()}
    for name, block in blocks.items():
        found.setdefault(block.value, set()).add(name)
    assert found["emb"] == {"a.weight"}
    assert found["head"] == {"d.weight", "d.bias"}
    assert found[inside] == {name for name in blocks if name.startswith("b.") and ".norm" not in name}


def test_a_mixer_alone_is_a_mixer() -> None:
    for model in (StateSpaceMixer(), nn.ModuleDict({"router": StateSpaceMixer()})):
        assert set(classify(model).values()) == {Block.SSM}


@pytest.mark.parametrize("vocabulary", [WIDTH, 4 * WIDTH, 40])
def test_a_recurrent_network_is_a_mixer_and_what_reads_it_last_is_the_head(vocabulary: int) -> None:
    blocks = classify(LSTMLanguageModel(vocabulary))
    assert blocks["encoder.weight"] is Block.EMB
    assert {blocks[name] for name in blocks if name.startswith("rnn.")} == {Block.SSM}
    assert {blocks["decoder.weight"], blocks["decoder.bias"]} == {Block.HEAD}


class RecurrenceByHand(nn.Module):
    """Three square matrices beside the embedding: which of them is the head, no shape tells."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.i2h, self.h2h = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.add_module(head, nn.Linear(WIDTH, WIDTH))


def test_square_matrices_beside_the_embedding_are_no_heads_but_the_one_that_is_named_so() -> None:
    for head in ("h2o", "lm_head"):
        with pytest.raises(ValueError, match="to no block that the rules know") as caught:
            classify(RecurrenceByHand(head))
        assert "i2h.weight" in str(caught.value)
        assert ("lm_head" in str(caught.value)) is False
    others = {r"^[ih]2h\.": Block.SSM}
    assert classify(RecurrenceByHand("lm_head"), overrides=others)["lm_head.weight"] is Block.HEAD


class TinyGPT(nn.Module):
    """One layer, and its matrices in the model itself; as many hidden units as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(4 * WIDTH, WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, 4 * WIDTH)


def test_a_head_of_the_shape_of_a_feed_forward_matrix_is_a_head() -> None:
    blocks = classify(TinyGPT())
    assert {blocks[f"{name}.weight"] for name in ("up", "down")} == {Block.FFN}
    assert blocks["lm_head.weight"] is Block.HEAD


def with_heads(vocabulary: int, **heads: nn.Module) -> nn.Module:
    model = LanguageModel(StateSpaceLayer, vocabulary, 2)
    del model.d
    for name, head in heads.items():
        model.add_module(name, head)
    return model


@pytest.mark.parametrize("vocabulary", [WIDTH, 40])
def test_several_heads(vocabulary: int) -> None:
    def linear(outputs: int = vocabulary) -> nn.Module:
        return nn.Linear(WIDTH, outputs)

    model = with_heads(
        vocabulary,
        lm_head=linear(),
        mtp_heads=nn.ModuleList([linear(), linear()]),
        value_head=linear(1),
        classifier=linear(5),
    )
    blocks = classify(model)
    heads = ("lm_head", "mtp_heads.0", "mtp_heads.1", "value_head", "classifier")
    assert {name for name, block in blocks.items() if block is Block.HEAD} == {
        f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")
    }


def test_a_head_that_shares_the_embedding_leaves_the_other_square_matrices_alone() -> None:
    model = with_heads(WIDTH, head=nn.Linear(WIDTH, WIDTH, bias=False), odd=nn.Linear(WIDTH, WIDTH))
    model.head.weight = model.a.weight
    with pytest.raises(ValueError, match=r"2 parameters belong") as caught:
        classify(model)
    assert "odd.weight" in str(caught.value)
    assert classify(model, overrides={"odd": "other"})["a.weight"] is Block.EMB


class MedusaHead(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, vocabulary)
        self.norm = nn.LayerNorm(WIDTH)


def test_heads_in_a_list_that_are_modules_of_their_own() -> None:
    plain = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40)) for _ in range(3)])
    named = nn.ModuleList([MedusaHead(40) for _ in range(3)])
    for heads in (plain, named):
        blocks = classify(with_heads(40, x=heads))
        weights = {name for name, block in blocks.items() if block is Block.HEAD and "weight" in name}
        assert len(weights) == 3
        assert all(name.startswith("x.") for name in weights)


def test_the_last_of_a_sequence_is_its_head() -> None:
    model = nn.Sequential(nn.Embedding(WIDTH, WIDTH), nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    assert [block.value for block in classify(model).values()] == ["emb", *["ssm"] * 4, "head", "head"]
    twice = nn.Sequential(
        nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
    )
    with pytest.raises(ValueError, match=r"2 parameters belong") as caught:
        classify(twice)
    assert "1.weight" in str(caught.value)


def test_a_router_named_as_a_classifier_inside_a_layer_is_a_router() -> None:
    with torch.device("meta"):
        blocks = classify(build("longcat_flash"))
    assert blocks["model.layers.0.mlp.router.classifier.weight"] is Block.ROUTER
