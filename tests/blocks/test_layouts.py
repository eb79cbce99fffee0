"""How the parts of a fused weight lie in it: known, proved or stated, and never guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

import blockwise_lr
from blockwise_lr import Layout, classify, measure_sharpness, register_layout, split_fused
from blockwise_lr.blocks.autograd_layouts import NotSeenError, layout_of
from support.by_function import moved_by, problems
from support.case import VOCAB, WIDTH

HEADS, SIZE = 4, 2
Heads = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From (batch, length, outputs) to queries, keys and values of (batch, heads, length, size)."""


def by_part(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y.view(*y.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)


def by_head(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y.view(*y.shape[:2], HEADS, 3, SIZE).permute(3, 0, 2, 1, 4).unbind(0)


def by_head_chunked(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y.view(*y.shape[:2], HEADS, 3 * SIZE).transpose(1, 2).chunk(3, dim=-1)


def by_row(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y.view(*y.shape[:2], HEADS, SIZE, 3).transpose(1, 2).unbind(-1)


def values_first(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v, k, q = y.view(*y.shape[:2], HEADS, 3, SIZE).permute(3, 0, 2, 1, 4).unbind(0)
    return q, k, v


def by_group(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two groups of two queries, a key and a value."""
    q, k, v = y.view(*y.shape[:2], 2, 4, SIZE).permute(0, 2, 3, 1, 4).split([2, 1, 1], dim=2)
    k, v = (each.expand(-1, -1, 2, -1, -1) for each in (k, v))
    return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)


EXPECTED: dict[Heads, Layout] = {
    by_part: Layout((("q", 8), ("k", 8), ("v", 8)), 1),
    by_head: Layout((("q", 8), ("k", 8), ("v", 8)), 4),
    by_head_chunked: Layout((("q", 8), ("k", 8), ("v", 8)), 4),
    by_row: Layout((("q", 8), ("k", 8), ("v", 8)), 8),
    values_first: Layout((("v", 8), ("k", 8), ("q", 8)), 4),
    by_group: Layout((("q", 8), ("k", 4), ("v", 4)), 2),
}


def fused_kernel(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.sigmoid() @ (k.sigmoid().transpose(-1, -2) @ v)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)


def by_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 30 * torch.tanh((q @ k.transpose(-2, -1)) / math.sqrt(SIZE) / 30)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return nn.functional.dropout(scores.masked_fill(future, -math.inf).softmax(dim=-1), 0.0) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) + torch.zeros(1)
    return torch.einsum("bhij,bhjd->bhid", nn.functional.softmax(scores, -1), v)


def by_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.matmul(k, q.transpose(-1, -2)).transpose(2, 3).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def by_einsum_of_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhjd,bhid->bhij", k, q).softmax(-1).matmul(v)


def by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v)


WAYS = (by_sdpa, by_softmax, by_einsum, by_keys_first, by_einsum_of_keys_first, by_name)


class Mixer(nn.Module):
    """An attention of one's own: `heads` says how its weight lies, `attend` how it computes."""

    def __init__(
        self, heads: Heads = by_head, attend: Callable[..., Tensor] = by_sdpa, bias: bool = True
    ) -> None:
        super().__init__()
        self.n_head, self.heads, self.attend = HEADS, heads, attend
        self.qkv = nn.Linear(
            WIDTH, EXPECTED[heads].parts[0][1] + sum(w for _, w in EXPECTED[heads].parts[1:]), bias
        )
        self.proj = nn.Linear(WIDTH, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*self.heads(self.qkv(x))).transpose(1, 2).flatten(2))


class Functional(Mixer):
    """The weight is used without its layer being called."""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.qkv.weight, self.qkv.bias)
        return self.proj(self.attend(*self.heads(y)).transpose(1, 2).flatten(2))


class Rotated(Mixer):
    """Cannot run alone: it needs what its model gives it."""

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = self.heads(self.qkv(x))
        return self.proj(self.attend(q * freqs, k * freqs, v).transpose(1, 2).flatten(2))


class PositionedAttention(Mixer):
    """Made for one number of tokens: a bias for each pair of positions."""

    def __init__(self, heads: Heads, tokens: int) -> None:
        super().__init__(heads)
        self.position_bias = nn.Parameter(torch.zeros(HEADS, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.qkv(x))
        weights = (q @ k.transpose(-2, -1) + self.position_bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Merged(nn.Module):
    """The output's matrix in one parameter with those of queries, keys and values, in some order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.n_head, self.order = HEADS, order
        self.qkvo_w = nn.Parameter(torch.randn(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        matrix = dict(zip(self.order, self.qkvo_w.chunk(4)))
        q, k, v = (linear(x, matrix[p]).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in "qkv")
        return linear(by_sdpa(q, k, v).transpose(1, 2).flatten(2), matrix["o"])


class Holder(nn.Module):
    """Only holds the layers of an attention; who uses them is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.qkv, self.proj = HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


class Around(nn.Module):
    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads, self.attn = heads, Holder()

    def forward(self, x: Tensor) -> Tensor:
        mixed = by_sdpa(*self.heads(self.attn.qkv(x)))
        return self.attn.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(WIDTH), attention
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x), *given)
        return x + self.down(self.up(self.norm2(x)).relu())


class Language(nn.Module):
    """A model that takes token ids."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(each) for each in attentions])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("freqs", torch.linspace(0.5, 1, SIZE))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.wte(tokens)
        for layer in self.layers:
            x = layer(x, self.freqs) if isinstance(layer.mixer, Rotated) else layer(x)
        return self.head(x)


class Pictures(Language):
    """A model that takes something else, by keywords."""

    def forward(self, *, pixels: Tensor, scale: float) -> Tensor:
        x = scale * pixels
        for layer in self.layers:
            x = layer(x, self.freqs) if isinstance(layer.mixer, Rotated) else layer(x)
        return self.head(x)


def layout_in(module: nn.Module) -> Layout:
    concatenation = module.parametrizations.weight[0]
    return Layout(tuple(zip(concatenation.part_names, concatenation.sizes)), concatenation.repeats)


def assert_split_by_function(model: nn.Module, run: Callable[[], object]) -> None:
    """Queries and keys move scores and values move values, as an independent proof says."""
    blocks = classify(model)
    proof = moved_by(model, blocks, run)
    assert proof.attentions
    assert problems(blocks, proof) == []


# Proved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("heads", EXPECTED, ids=lambda way: way.__name__)
def test_an_attention_of_ones_own_is_split_where_it_splits_itself(heads: Heads, attend) -> None:
    model = Mixer(heads, attend)
    weight, x = model.qkv.weight.detach().clone(), torch.randn(2, 5, WIDTH)
    before = model(x)
    split_fused(model)
    assert torch.equal(model(x), before)
    assert layout_in(model.qkv) == EXPECTED[heads]
    assert torch.equal(model.qkv.weight, weight)
    queries = heads(weight.T[None])[0]  # rows as if they were outputs
    part = [name for name, _ in EXPECTED[heads].parts].index("q")
    rows = getattr(model.qkv.parametrizations.weight, f"original{part}")
    assert {tuple(row.tolist()) for row in rows} == {
        tuple(row) for row in queries.transpose(2, 3).flatten(0, 2).tolist()
    }


@pytest.mark.parametrize("tokens", [3, 9])
def test_an_attention_for_one_number_of_tokens_is_proved_with_so_many(tokens: int) -> None:
    model = split_fused(PositionedAttention(by_group, tokens))
    assert layout_in(model.qkv) == EXPECTED[by_group]


@pytest.mark.parametrize("order", ["qkvo", "ovkq", "kqov"])
def test_the_matrix_of_the_output_is_the_one_that_moves_nothing_that_attends(order: str) -> None:
    model = split_fused(Language(Merged(order)))
    concatenation: Any = model.layers[0].mixer.parametrizations["qkvo_w"][0]
    assert list(zip(concatenation.part_names, concatenation.sizes)) == [(part, WIDTH) for part in order]


def test_rows_that_move_nothing_are_the_output_only_if_others_are_all_the_rest() -> None:
    q, k, v, none = (frozenset(each) for each in ("q", "k", "v", ""))
    assert layout_of([q, k, v, none], "qkvo") == Layout((("q", 1), ("k", 1), ("v", 1), ("o", 1)))
    with pytest.raises(NotSeenError, match="none of its 4 rows moves values alone"):
        layout_of([q, k, none, none], "qkvo")
    with pytest.raises(NotSeenError, match="row 3 first, move nothing that attends"):
        layout_of([q, k, v, none], "qkv")


@pytest.mark.parametrize("heads", EXPECTED, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [Mixer, Functional])
def test_a_whole_model_is_split_by_function(heads: Heads, make) -> None:
    torch.manual_seed(0)
    model = split_fused(Language(make(heads), make(heads, by_softmax)))
    tokens = torch.randint(VOCAB, (2, 6))
    assert_split_by_function(model, lambda: model(tokens))
    assert [layout_in(layer.mixer.qkv) for layer in model.layers] == [EXPECTED[heads]] * 2


@pytest.mark.parametrize("heads", EXPECTED, ids=lambda way: way.__name__)
def test_an_attention_that_needs_its_model_is_proved_by_tokens(heads: Heads) -> None:
    model = split_fused(Language(Rotated(heads)))
    assert layout_in(model.layers[0].mixer.qkv) == EXPECTED[heads]


@pytest.mark.parametrize("heads", EXPECTED, ids=lambda way: way.__name__)
def test_an_example_proves_what_nothing_else_can(heads: Heads) -> None:
    model = Pictures(Rotated(heads), Rotated(heads, by_softmax))
    batch = {"pixels": torch.randn(2, 5, WIDTH), "scale": 0.5}
    with pytest.raises(ValueError, match=r"split_fused\(model, example=batch\)"):
        split_fused(model)
    before = model(**batch)
    split_fused(model, example=batch)
    assert torch.equal(model(**batch), before)
    assert [layout_in(layer.mixer.qkv) for layer in model.layers] == [EXPECTED[heads]] * 2
    assert_split_by_function(model, lambda: model(**batch))


@pytest.mark.parametrize(
    "batch", [torch.arange(5)[None], (torch.arange(5)[None],), {"tokens": torch.arange(5)[None]}]
)
def test_an_example_is_given_as_the_model_takes_it(batch) -> None:
    model = split_fused(Language(Rotated(by_head)), example=batch)
    assert layout_in(model.layers[0].mixer.qkv) == EXPECTED[by_head]


def test_a_proof_disturbs_nothing() -> None:
    model = Language(Rotated(by_head), Mixer(by_head))
    model.register_buffer("expanded", torch.ones(1).expand(3))  # torch does not write into such a tensor
    model.layers[1].eval()
    model.layers[0].mixer.qkv.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.no_grad():
        split_fused(model, example=torch.arange(5)[None])
    assert torch.equal(torch.rand(3), expected)
    assert {key: value.tolist() for key, value in model.state_dict().items()} == {
        key: value.tolist() for key, value in values.items()
    }
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == [
        f"layers.0.mixer.qkv.parametrizations.weight.original{i}" for i in range(3)
    ]
    assert [m.training for m in model.modules() if "parametrize" not in type(m).__module__][:3] == modes[:3]
    assert not model.layers[1].mixer.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_at_zero_and_in_half_precision_and_on_the_meta_device_are_proved() -> None:
    zero = Mixer(by_head)
    nn.init.zeros_(zero.qkv.weight)
    with torch.device("meta"):
        meta = Language(Mixer(by_head))
        split_fused(Language(Mixer(by_row)))
    for mixer in (
        split_fused(zero),
        split_fused(Mixer(by_head).bfloat16()),
        split_fused(meta).layers[0].mixer,
    ):
        assert layout_in(mixer.qkv) == EXPECTED[by_head]
    assert meta.layers[0].mixer.qkv.parametrizations.weight.original0.is_meta


class Grouped(nn.Module):
    """Its queries come first, then keys and values of each head: no repeated order."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.qkv, self.proj = HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = self.qkv(x).split([WIDTH, 2 * WIDTH], dim=-1)
        k, v = kv.view(*x.shape[:2], HEADS, 2 * SIZE).transpose(1, 2).chunk(2, dim=-1)
        q = q.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)
        return self.proj(by_sdpa(q, k, v).transpose(1, 2).flatten(2))


def test_an_order_that_does_not_repeat_is_refused_with_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"follow no repeated order: 8 q, 2 k, 2 v, 2 k, 2 v"):
        split_fused(Grouped())


class Shared(Mixer):
    """Mixes all rows before the heads: every row moves everything."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        q, k, v = by_part(y + y.mean(-1, keepdim=True))
        return self.proj(by_sdpa(q, k, v).transpose(1, 2).flatten(2))


def test_rows_that_do_several_jobs_are_refused_with_what_they_move() -> None:
    with pytest.raises(ValueError, match=r"24 of its 24 rows, row 0 first, move queries and keys and values"):
        split_fused(Shared(by_part))


# Known ---------------------------------------------------------------------------------------------------


def test_a_known_class_whose_forward_is_replaced_is_not_known() -> None:
    transformers = pytest.importorskip("transformers")
    from support.cases import gpt2

    class Mine(transformers.models.gpt2.modeling_gpt2.GPT2Attention):
        def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
            q, k, v = by_head(self.c_attn(hidden_states))
            return self.c_proj(by_sdpa(q, k, v).transpose(1, 2).flatten(2)), None

    model = gpt2(n_head=HEADS)
    model.transformer.h[0].attn.__class__ = Mine
    assert layout_in(split_fused(model).transformer.h[0].attn.c_attn) == EXPECTED[by_head]


class GPTNeoXAttention(Mixer):
    """The name of a class in transformers, and another layout."""


def test_the_name_of_a_class_alone_vouches_for_nothing() -> None:
    model = GPTNeoXAttention(by_part)
    model.query_key_value = model.qkv
    del model.qkv
    model.forward = lambda x: model.proj(
        by_sdpa(*by_part(model.query_key_value(x))).transpose(1, 2).flatten(2)
    )
    with pytest.raises(ValueError, match="is not known for the class GPTNeoXAttention"):
        split_fused(model)


# Stated --------------------------------------------------------------------------------------------------


class Opaque(nn.Module):
    """Nothing can be proved of it: it has no forward."""

    def __init__(self, outputs: int = 3 * WIDTH, key_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = HEADS, key_heads
        self.qkv, self.proj = nn.Linear(WIDTH, outputs), nn.Linear(WIDTH, WIDTH)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("q k v", EXPECTED[by_part]),
        ("v, k, q", Layout((("v", 8), ("k", 8), ("q", 8)), 1)),
        ("q k v per head", EXPECTED[by_head]),
        (Layout((("q", 8), ("k", 8), ("v", 8)), 2), Layout((("q", 8), ("k", 8), ("v", 8)), 2)),
        (lambda attention, width: Layout((("q", 8), ("kv", width - 8))), Layout((("q", 8), ("kv", 16)), 1)),
        ({"qkv": "q k v per head"}, EXPECTED[by_head]),
        ({Opaque: "q k v per head"}, EXPECTED[by_head]),
    ],
)
def test_a_layout_is_stated(layout, expected: Layout) -> None:
    assert layout_in(split_fused(Opaque(), layout=layout).qkv) == expected


def test_a_stated_layout_by_group_has_the_widths_of_grouped_queries() -> None:
    model = split_fused(Opaque(2 * WIDTH, key_heads=2), layout="q k v per group")
    assert layout_in(model.qkv) == EXPECTED[by_group]


def test_one_statement_is_for_what_is_not_known() -> None:
    from support.cases import gpt2

    model = split_fused(nn.ModuleList([gpt2(), Opaque()]), layout="q k v per head")
    assert layout_in(model[0].transformer.h[0].attn.c_attn).repeats == 1
    assert layout_in(model[1].qkv) == EXPECTED[by_head]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("q q v", "'q q v' is no layout: expected different parts of q, k, v"),
        ("query key value", "'query key value' is no layout"),
        ("q k v per layer", "'q k v per layer' is no layout"),
        (3, 'a layout is words such as "q k v"'),
        (Layout((("q", 8), ("k", 8)), 1), "does not fit: expected parts of 24 outputs in all"),
        (Layout((("q", 8), ("x", 16)), 1), "has the part 'x'; the parts are: q, k, v"),
        ("q k v per group", r"the number of groups cannot be told.*Layout\(\(\(\"q\", 8\)"),
        (
            {"elsewhere": "q k v"},
            r'layout= names r"elsewhere", which matches no fused weight.*qkv\.weight, qkv\.bias',
        ),
        ({"(": "q k v"}, "not a valid regular expression"),
        ({3: "q k v"}, "expected a module class or a string"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout, message: str) -> None:
    model = Opaque()
    with pytest.raises((ValueError, TypeError), match=message):
        split_fused(model, layout=layout)
    assert set(dict(model.named_parameters())) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def test_an_unknown_layout_is_refused_with_the_ways_to_go_on_and_they_work() -> None:
    with pytest.raises(ValueError) as caught:
        split_fused(Opaque())
    message = str(caught.value)
    assert message.startswith("split_fused cannot split these fused weights (nothing was changed):\n")
    assert "how queries and keys and values lie in it is not known for the class Opaque: " in message
    assert "split_fused(model, example=batch)" in message
    ways = re.findall(r'layout="([^"]+)"', message)
    assert ways == ["q k v", "q k v per head"]
    for way in ways:
        split_fused(Opaque(), layout=way)


def test_an_example_that_the_model_does_not_take_is_named() -> None:
    model = Pictures(Rotated(by_head))
    with pytest.raises(
        ValueError, match=r"cannot be run on example=: TypeError: .*a mapping is given as key"
    ):
        split_fused(model, example=torch.arange(3))


def test_an_example_that_shows_no_attention_is_refused() -> None:
    class Skips(Language):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.wte(tokens))

    with pytest.raises(ValueError, match=r"no attention was seen in it"):
        split_fused(Skips(Rotated(by_head)), example=torch.arange(3)[None])


@pytest.mark.parametrize("target", [Opaque, "Opaque", r"Opaque\.qkv", r"Opa\w+"])
def test_a_registered_layout_is_used_until_it_is_taken_back(target) -> None:
    undo = register_layout(target, "q k v per head")
    try:
        assert layout_in(split_fused(Opaque()).qkv) == EXPECTED[by_head]
        later = register_layout(Opaque, "q k v")
        assert layout_in(split_fused(Opaque()).qkv) == EXPECTED[by_part]
        later()
        assert layout_in(split_fused(Opaque()).qkv) == EXPECTED[by_head]
    finally:
        undo()
    with pytest.raises(ValueError, match="is not known for the class Opaque"):
        split_fused(Opaque())
    undo()  # twice is once


def test_a_registration_that_cannot_be_is_refused() -> None:
    with pytest.raises(TypeError, match="register_layout: 3 is a int; expected a module class or a string"):
        register_layout(3, "q k v")
    with pytest.raises(ValueError, match="is not a valid regular expression"):
        register_layout("(", "q k v")
    with pytest.raises(ValueError, match="'a b' is no layout"):
        register_layout(Opaque, "a b")
    assert "register_layout" in blockwise_lr.__all__


# Reports on a model that is not split ----------------------------------------------------------------


def test_reports_on_an_unsplit_model_cut_the_weight_where_the_attention_does() -> None:
    torch.manual_seed(0)
    whole = Language(Mixer(by_head))
    tokens = torch.randint(VOCAB, (2, 6))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    before = measure_sharpness(whole, [tokens], loss_fn=loss, estimator="empirical", seed=0)
    after = measure_sharpness(split_fused(whole), [tokens], loss_fn=loss, estimator="empirical", seed=0)
    parts = "layers.0.mixer.qkv.parametrizations.weight.original"
    for index, part in enumerate("qkv"):
        mean, _, numel = before.per_parameter[f"layers.0.mixer.qkv.weight:{part}"]
        assert numel == 64
        assert mean == pytest.approx(after.per_parameter[f"{parts}{index}"][0], rel=1e-4)


def test_an_unknown_layout_has_no_parts_unless_it_is_stated_or_shown() -> None:
    assert classify(Opaque()).assignment("qkv.weight").slices is None
    stated = classify(Opaque(), layout="q k v per head").assignment("qkv.weight").slices
    assert {part: piece.repeats for part, piece in stated.items()} == {"q": 4, "k": 4, "v": 4}
    model = Pictures(Rotated(by_row))
    shown = classify(model, example={"pixels": torch.randn(1, 4, WIDTH), "scale": 1.0})
    assert shown.assignment("layers.0.mixer.qkv.weight").slices["v"].repeats == 8
