"""classify: the right block for every parameter, a reason for each, and an error where there is none."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from itertools import pairwise

import pytest
import torch
from torch import nn

from blockwise_lr.blocks import Block, BlockMap, classify, split_fused
from support.case import CONTEXT, VOCAB, WIDTH, Case
from support.cases import CASES, gpt2, llama
from support.nano import NanoAttention, NanoGPT

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def as_text(blocks: BlockMap) -> dict[str, str]:
    return {name: block.value for name, block in blocks.items()}


@by_name
def test_every_parameter_is_in_its_block_exactly_once(case: Case) -> None:
    model = case.model()
    blocks = classify(model)
    assert as_text(blocks) == case.blocks
    assert list(blocks) == [name for name, _ in model.named_parameters()]
    assert sum(blocks.counts().values()) == sum(p.numel() for p in model.parameters())


def test_the_description_of_every_block_names_a_parameter_in_it() -> None:
    body = ast.parse(textwrap.dedent(inspect.getsource(Block))).body[0].body  # type: ignore[attr-defined]
    described = {
        Block[member.targets[0].id]: re.findall("``(.*?)``", line.value.value)
        for member, line in pairwise(body)
        if isinstance(member, ast.Assign) and isinstance(line, ast.Expr)
    }
    assert list(described) == list(Block)
    for block, names in described.items():
        assert len(names) == 1
        assert {case.blocks[names[0]] for case in CASES if names[0] in case.blocks} == {block.value}


@by_name
def test_every_parameter_of_a_split_model_is_in_its_block(case: Case) -> None:
    model = split_fused(case.model())
    assert as_text(classify(model)) == case.split_blocks()


@by_name
def test_every_parameter_has_a_reason_in_words(case: Case) -> None:
    for model in (case.model(), split_fused(case.model())):
        blocks = classify(model)
        for name in blocks:
            assert len(blocks.reason(name).split()) >= 3, name
            assert "{" not in blocks.reason(name), name


@by_name
def test_the_meta_device_gives_the_same_blocks(case: Case) -> None:
    with torch.device("meta"):
        model = case.build()
    assert as_text(classify(model)) == case.blocks


def test_a_fused_weight_lists_its_parts() -> None:
    assignment = classify(gpt2()).assignment("transformer.h.0.attn.c_attn.bias")
    assert assignment.parts == {"q": Block.QK, "k": Block.QK, "v": Block.VO}
    assert "split_fused" in assignment.reason


def test_a_part_of_a_split_weight_says_where_it_came_from() -> None:
    blocks = classify(split_fused(gpt2()))
    name = "transformer.h.0.attn.c_attn.parametrizations.weight.original2"
    assert blocks.reason(name) == (
        "makes the values of the attention transformer.h.0.attn "
        "(split from the fused transformer.h.0.attn.c_attn.weight)"
    )
    assert blocks.assignment(name).parts is None


def test_frozen_parameters_are_left_out() -> None:
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    assert "transformer.wpe.weight" not in classify(model)
    assert Block.POS not in classify(model).counts()


def test_a_model_without_trainable_parameters_gives_an_empty_map() -> None:
    assert len(classify(gpt2().requires_grad_(False))) == 0


def test_a_tied_head_is_embedding_even_when_the_head_comes_first() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(WIDTH, VOCAB)
            self.tokens = nn.Embedding(VOCAB, WIDTH)
            self.tokens.weight = self.lm_head.weight

    assert as_text(classify(HeadFirst())) == {"lm_head.weight": "emb", "lm_head.bias": "emb"}


def test_a_layer_that_is_used_twice_counts_once() -> None:
    model = NanoGPT(layers=1)
    once = classify(model)
    model.transformer.h.append(model.transformer.h[0])
    assert as_text(classify(model)) == as_text(once)


def test_positions_are_told_from_tokens_by_size_when_names_say_nothing() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"vocab_size": VOCAB, "block_size": CONTEXT})()
            self.a, self.b = nn.Embedding(CONTEXT, WIDTH), nn.Embedding(VOCAB, WIDTH)

    assert as_text(classify(Plain())) == {"a.weight": "pos", "b.weight": "emb"}


def test_as_many_positions_as_tokens_are_still_told_apart() -> None:
    blocks = classify(gpt2(vocab_size=CONTEXT))
    assert blocks["transformer.wte.weight"] is Block.EMB
    assert blocks["transformer.wpe.weight"] is Block.POS


def test_a_fused_weight_and_the_feed_forward_are_found_whatever_they_are_called() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y = NanoAttention(), nn.ModuleDict({"u": nn.Linear(8, 24), "w": nn.Linear(24, 8)})
            self.x.foo, self.x.bar = self.x.c_attn, self.x.c_proj
            del self.x.c_attn, self.x.c_proj

    blocks = classify(nn.ModuleList([Layer()]))
    assert {name: block.value for name, block in blocks.items() if "weight" in name} == {
        "0.x.foo.weight": "qkv",
        "0.x.bar.weight": "vo",
        "0.y.u.weight": "ffn",
        "0.y.w.weight": "ffn",
    }


def test_matrices_of_an_unrecognised_attention_are_not_taken_for_feed_forward() -> None:
    class LatentAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    layer = nn.ModuleDict({"one": NanoAttention(), "two": LatentAttention(), "mlp": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"two\.down\.weight") as caught:
        classify(layer)
    assert "one." not in str(caught.value)


def test_unknown_parameters_are_all_named_with_the_override_to_write() -> None:
    model = NanoGPT(layers=2)
    for block in model.transformer.h:
        block.gate = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError) as caught:
        classify(model)
    assert str(caught.value) == (
        "2 parameters belong to no block that the rules know:\n"
        "  transformer.h.0.gate  shape (3, 2), in a NanoBlock\n"
        "  transformer.h.1.gate  shape (3, 2), in a NanoBlock\n"
        "Say which block each is in (OTHER gets the base learning rate):\n"
        '  classify(model, overrides={r"^transformer\\.h\\.\\d+\\.gate$": Block.OTHER})\n'
        "or, for every model, one rule for each kind of parameter (see register_rule):\n"
        '  register_rule(r"^transformer\\.h\\.\\d+\\.gate$", Block.OTHER, "why it is in this block")'
    )
    # What the message says to write works as it stands.
    shown = re.search(r"overrides=(\{.*\})\)", str(caught.value))
    assert shown is not None
    blocks = classify(model, overrides=eval(shown[1], {"Block": Block}))
    assert blocks["transformer.h.1.gate"] is Block.OTHER


def test_a_parameter_shared_between_different_blocks_is_named_with_its_places() -> None:
    model = llama()
    model.model.layers[0].self_attn.o_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    expected = (
        "model.layers.0.self_attn.q_proj.weight  shape (8, 8), in a Linear; shared between different blocks: "
        "model.layers.0.self_attn.q_proj (qk), model.layers.0.self_attn.o_proj (vo)"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        classify(model)


def test_the_first_override_that_matches_wins_and_is_the_reason() -> None:
    overrides = {r"c_fc\.weight$": Block.OTHER, nn.LayerNorm: Block.OTHER, r"\.mlp\.": Block.CONV}
    blocks = classify(gpt2(), overrides=overrides)
    assert blocks["transformer.h.0.mlp.c_fc.weight"] is Block.OTHER
    assert blocks.reason("transformer.h.0.mlp.c_fc.weight") == r'your override r"c_fc\.weight$"'
    assert blocks["transformer.h.0.mlp.c_fc.bias"] is Block.CONV
    assert blocks["transformer.ln_f.bias"] is Block.OTHER
    assert blocks.reason("transformer.ln_f.bias") == "your override LayerNorm"
    assert blocks["transformer.h.0.attn.c_proj.weight"] is Block.VO


def test_a_module_type_claims_everything_inside_its_instances() -> None:
    blocks = classify(NanoGPT(), overrides={NanoAttention: Block.OTHER})
    assert [name for name, block in blocks.items() if block is Block.OTHER] == [
        f"transformer.h.0.attn.{child}.{leaf}"
        for child in ("c_attn", "c_proj")
        for leaf in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"nowhere": Block.OTHER}, ValueError, 'override r"nowhere" matches no trainable parameter'),
        ({nn.Conv2d: Block.CONV}, ValueError, "override Conv2d matches no trainable parameter"),
        (
            {"wte": "embedding"},
            ValueError,
            "is set to 'embedding', which is no Block; the blocks are: emb, qk",
        ),
        ({"(": Block.OTHER}, ValueError, 'override r"(" is not a valid regular expression'),
        (
            {3: Block.OTHER},
            TypeError,
            "override key 3 is a int; expected a regular expression (str) or a module class",
        ),
    ],
)
def test_a_wrong_override_is_refused(overrides: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        classify(gpt2(), overrides=overrides)


def test_a_parameter_that_was_not_classified_is_named() -> None:
    with pytest.raises(KeyError, match="no parameter named 'nowhere' was classified"):
        classify(gpt2())["nowhere"]


class NamedAttention(nn.Module):
    """An attention whose layers have the names of a textbook."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.num_heads = 2
        for name in names.split():
            self.add_module(name, nn.Linear(8, 8, bias=False))


@pytest.mark.parametrize("names", ["W_query W_key W_value out_proj", "w_q w_k w_v w_o", "wq wk wv wo"])
def test_the_names_of_textbooks_are_known(names: str) -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(32, 8), "attention": NamedAttention(names)})
    query, key, value, output = names.split()
    found = {name.split(".")[1]: str(block) for name, block in classify(model).items() if "attention" in name}
    assert found == {query: "qk", key: "qk", value: "vo", output: "vo"}


class FusedSelfAttention(nn.Module):
    """Queries, and half as many keys and values, in one weight; the output is made outside of it."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * WIDTH)


def test_queries_are_as_wide_as_the_output_takes_also_where_that_is_made_beside_the_attention() -> None:
    output = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH), "norm": nn.LayerNorm(WIDTH)})
    model = split_fused(nn.ModuleDict({"self": FusedSelfAttention(), "output": output}), layout="q k v")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parts = [shapes[f"self.in_proj.parametrizations.weight.original{i}"] for i in range(3)]
    assert parts == [(WIDTH, WIDTH), (WIDTH // 2, WIDTH), (WIDTH // 2, WIDTH)]
    assert classify(model)["output.dense.weight"] is Block.VO


def test_a_name_that_is_bound_to_a_class_says_nothing_elsewhere() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(3, 5)})])})
    with pytest.raises(ValueError, match=r"layers\.0\.linear\.weight"):
        classify(model)
