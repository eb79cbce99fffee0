"""split_fused and merge_fused: nothing changes but what the optimizer sees."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from blockwise_lr.blocks import classify, merge_fused, split_fused
from blockwise_lr.blocks.fused import ModelFacts
from blockwise_lr.blocks.split_weights import merge_module, split_module
from blockwise_lr.blocks.weight_parts import FusedWeight
from support.case import VOCAB, WIDTH, Case
from support.cases import FUSED_CASES, gpt2, llama
from support.nano import NanoAttention, NanoGPT

by_name = pytest.mark.parametrize("case", FUSED_CASES, ids=lambda case: case.name)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal keys in equal order, values to the bit."""
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def frozen_copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@by_name
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_outputs_are_unchanged_to_the_bit(case: Case, training: bool, mode) -> None:
    # Without gradients and in eval mode, torch's encoder layer takes its fused fast path.
    whole, split = case.model().train(training), split_fused(case.model()).train(training)
    with mode():
        assert torch.equal(case.output(whole), case.output(split))


@by_name
def test_gradients_of_the_parts_are_the_slices_of_the_fused_gradient(case: Case) -> None:
    whole, split = case.model(), split_fused(case.model())
    for model in (whole, split):
        case.output(model).square().sum().backward()
    fused = dict(whole.named_parameters())
    parts = dict(split.named_parameters())
    facts = ModelFacts(whole)
    for name, blocks in case.split.items():
        path, _, leaf = name.rpartition(".")
        projection = facts.projections[path, leaf]
        lengths, dim = [size // projection.repeats for _, size in projection.parts], projection.dim
        by_repeat = fused[name].grad.unflatten(dim, (projection.repeats, -1)).split(lengths, dim + 1)
        slices = [piece.flatten(dim, dim + 1) for piece in by_repeat]
        prefix = f"{path}.parametrizations" if path else "parametrizations"
        for i, expected in enumerate(slices):
            assert torch.equal(parts[f"{prefix}.{leaf}.original{i}"].grad, expected), (name, blocks[i])
    for name, param in fused.items():
        if name not in case.split:
            assert torch.equal(param.grad, parts[name].grad), name


@by_name
def test_merging_restores_parameters_keys_order_and_values(case: Case) -> None:
    model = case.model()
    before, names = frozen_copy(model), [name for name, _ in model.named_parameters()]
    classes = [type(module) for module in model.modules()]
    hooks = [len(m._state_dict_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules()]
    merge_fused(split_fused(model))
    assert same(before, model.state_dict())
    assert [name for name, _ in model.named_parameters()] == names
    assert all(isinstance(param, nn.Parameter) and param.is_leaf for param in model.parameters())
    assert [type(module) for module in model.modules()] == classes
    assert hooks == [len(m._state_dict_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules()]


@by_name
def test_splitting_twice_is_splitting_once(case: Case) -> None:
    model = split_fused(case.model())
    before = {name: id(param) for name, param in model.named_parameters()}
    assert split_fused(model) is model
    assert {name: id(param) for name, param in model.named_parameters()} == before


@by_name
def test_a_split_model_keeps_the_original_state_dict(case: Case) -> None:
    model = case.model()
    before, metadata = frozen_copy(model), list(model.state_dict()._metadata)
    after = split_fused(model).state_dict()
    assert same(before, after)
    assert list(after._metadata) == metadata
    assert all(tensor.is_contiguous() for tensor in after.values())


@by_name
@pytest.mark.parametrize("assign", [False, True])
def test_a_split_model_loads_the_original_layout(case: Case, assign: bool) -> None:
    source = case.model()
    with torch.no_grad():
        for param in source.parameters():
            param.add_(torch.randn_like(param))
    model = split_fused(case.model())
    assert not torch.equal(case.output(model), case.output(source))
    result = model.load_state_dict(frozen_copy(source), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(case.output(model), case.output(source))
    assert same(model.state_dict(), source.state_dict())
    storages = [param.untyped_storage().data_ptr() for param in model.parameters()]
    assert len(set(storages)) == len(storages)
    assert all(param.is_contiguous() for param in model.parameters())


def test_a_split_model_loads_the_split_layout_too() -> None:
    source, model = split_fused(gpt2(n_layer=2)), split_fused(gpt2(n_layer=2))
    parts = {name: param.detach().clone() + 1 for name, param in source.named_parameters()}
    model.load_state_dict(parts | {"lm_head.weight": parts["transformer.wte.weight"]})
    assert all(torch.equal(param, parts[name]) for name, param in model.named_parameters())


def test_a_state_dict_of_another_size_is_refused_by_the_original_name() -> None:
    state = gpt2(n_embd=4).state_dict()
    with pytest.raises(RuntimeError) as caught:
        split_fused(gpt2()).load_state_dict(state)
    message = str(caught.value)
    assert (
        "size mismatch for transformer.h.0.attn.c_attn.weight: shape (4, 12) in the state dict, "
        "(8, 24) in the model (split by split_fused)"
    ) in message
    assert "original0" not in message


@pytest.mark.parametrize("build", [llama, lambda: nn.Linear(3, 3)])
def test_a_model_without_fused_weights_is_returned_unchanged(build) -> None:
    model = build()
    before = {name: id(param) for name, param in model.named_parameters()}
    assert split_fused(model) is model
    assert merge_fused(model) is model
    assert {name: id(param) for name, param in model.named_parameters()} == before


def test_requires_grad_is_kept_per_parameter_both_ways() -> None:
    model = gpt2()
    attention = model.transformer.h[0].attn.c_attn
    attention.weight.requires_grad_(False)
    split_fused(model)
    flags = {name: param.requires_grad for name, param in attention.named_parameters()}
    assert flags == {f"parametrizations.weight.original{i}": False for i in range(3)} | {
        f"parametrizations.bias.original{i}": True for i in range(3)
    }
    merge_fused(model)
    assert [(name, p.requires_grad) for name, p in attention.named_parameters()] == [
        ("weight", False),
        ("bias", True),
    ]


def test_merging_without_gradients_leaves_trainable_parameters() -> None:
    model = split_fused(gpt2())
    with torch.no_grad():
        merge_fused(model)
    assert model.transformer.h[0].attn.c_attn.weight.requires_grad
    assert "transformer.h.0.attn.c_attn.weight" in dict(model.named_parameters())


def test_initial_values_are_the_slices_and_share_no_memory() -> None:
    weight = NanoAttention(kv_heads=1).c_attn.weight.detach().clone()
    attention = NanoAttention(kv_heads=1)
    attention.c_attn.weight.data.copy_(weight)
    split_fused(attention)
    parts = attention.c_attn.parametrizations.weight
    for i, expected in enumerate(weight.split([8, 4, 4])):
        assert torch.equal(getattr(parts, f"original{i}"), expected)
    assert len({getattr(parts, f"original{i}").untyped_storage().data_ptr() for i in range(3)}) == 3


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    width=st.integers(1, 6),
    repeats=st.integers(1, 4),
    dim=st.integers(0, 1),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_split_then_merge_is_the_identity_for_any_parts_in_any_order(
    sizes, width, repeats, dim, bias, seed
) -> None:
    torch.manual_seed(seed)
    lengths, sizes = sizes, [size * repeats for size in sizes]
    total = sum(sizes)
    module = nn.Module()
    module.before = nn.Parameter(torch.randn(2))
    module.weight = nn.Parameter(torch.randn((total, width) if dim == 0 else (width, total)))
    module.bias = nn.Parameter(torch.randn(total)) if bias else None
    module.after = nn.Parameter(torch.randn(3))
    before = frozen_copy(module)
    x = torch.randn(module.weight.shape)
    (module.weight * x).sin().sum().backward()
    of_repeats = [stretch.split(lengths, dim) for stretch in module.weight.grad.chunk(repeats, dim)]
    slices = [torch.cat(stretches, dim) for stretches in zip(*of_repeats)]

    names = tuple("abcd"[: len(sizes)])
    concatenations = {"weight": FusedWeight(names, tuple(sizes), dim, repeats)}
    if bias:
        concatenations["bias"] = FusedWeight(names, tuple(sizes), 0, repeats)
    split_module(module, concatenations)
    (module.weight * x).sin().sum().backward()
    parts = module.parametrizations["weight"]
    assert all(torch.equal(getattr(parts, f"original{i}").grad, part) for i, part in enumerate(slices))
    assert same(module.state_dict(), before)
    module.load_state_dict({key: value + 1 for key, value in before.items()})
    assert torch.equal(module.weight, before["weight"] + 1)
    module.load_state_dict(before)

    merge_module(module)
    assert same(module.state_dict(), before)
    assert [name for name, p in module._parameters.items() if p is not None] == list(before)


@settings(deadline=None, max_examples=30)
@given(groups=st.integers(1, 3), kv_heads=st.integers(1, 3), head=st.integers(1, 4), bias=st.booleans())
def test_grouped_queries_of_any_size_split_where_the_forward_splits(groups, kv_heads, head, bias) -> None:
    heads = groups * kv_heads
    attention = NanoAttention(heads * head, heads, kv_heads, bias)
    x = torch.randn(2, 3, heads * head)
    before, whole = frozen_copy(attention), attention(x)
    split_fused(attention)
    sizes = [part.shape[0] for part in attention.c_attn.parametrizations.weight.parameters()]
    assert sizes == [heads * head, kv_heads * head, kv_heads * head]
    assert torch.equal(attention(x), whole)
    assert same(merge_fused(attention).state_dict(), before)


def test_a_deep_copy_of_a_split_model_stands_alone() -> None:
    model = split_fused(gpt2())
    twin = copy.deepcopy(model)
    tokens = torch.arange(6)[None]
    state = {key: value + 1 for key, value in frozen_copy(model).items()}
    before = frozen_copy(model)
    twin.load_state_dict(state)
    assert same(model.state_dict(), before)
    assert same(twin.state_dict(), state)
    assert torch.equal(model(tokens).logits, gpt2_like(before)(tokens).logits)
    assert same(merge_fused(twin).state_dict(), state)
    assert "transformer.h.0.attn.c_attn.parametrizations.weight.original0" in dict(model.named_parameters())
    assert same(model.state_dict(), before)


def gpt2_like(state: dict[str, Tensor]) -> nn.Module:
    model = gpt2()
    model.load_state_dict(state)
    return model


def test_pickling_a_split_model_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match=r"only supported through state_dict"):
        pickle.dumps(split_fused(NanoAttention()))


def test_tied_weights_stay_tied() -> None:
    model = split_fused(NanoGPT())
    assert model.lm_head.weight is model.transformer.wte.weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    merge_fused(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_training_a_split_model_is_training_the_fused_one() -> None:
    models = [gpt2(), gpt2()]
    models[1].load_state_dict(models[0].state_dict())
    split_fused(models[1])
    tokens = torch.randint(VOCAB, (4, 10), generator=torch.Generator().manual_seed(0))
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        for _ in range(5):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
    assert same(models[0].state_dict(), models[1].state_dict())


class Interleaved(nn.Module):
    """A fused weight by the name of those that lie head by head, in a class that nobody knows."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


def test_a_layout_that_is_not_known_is_refused_by_name_and_nothing_changes() -> None:
    model = nn.ModuleDict({"attention": Interleaved()})
    names = [name for name, _ in model.named_parameters()]
    assert classify(model)["attention.query_key_value.weight"] == "qkv"
    with pytest.raises(ValueError) as caught:
        split_fused(model)
    problem = (
        "how queries and keys and values lie in it is not known for the class Interleaved: "
        "its attention has no forward that could be run alone"
    )
    assert str(caught.value) == (
        "split_fused cannot split these fused weights (nothing was changed):\n"
        f"  attention.query_key_value.weight: {problem}\n"
        f"  attention.query_key_value.bias: {problem}\n"
        "Prove the layout by a batch that the model takes: split_fused(model, example=batch)\n"
        'or state it: split_fused(model, layout="q k v") if all rows of the queries come first, then the keys, then '
        'the values; layout="q k v per head" if they lie head by head\n'
        "Without splitting, give the whole weight one block: "
        'classify(model, overrides={r"NAME": Block.VO})'
    )
    assert [name for name, _ in model.named_parameters()] == names


def test_parts_that_lie_head_by_head_are_put_together_from_every_head() -> None:
    fused = torch.arange(12.0)[:, None]  # two heads of q, k and v with two rows each
    q, k, v = FusedWeight(("q", "k", "v"), (4, 4, 4), 0, 2).right_inverse(fused)
    assert [part.flatten().tolist() for part in (q, k, v)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_a_fused_weight_that_two_modules_share_is_refused_by_name() -> None:
    model = NanoGPT(layers=2)
    first, second = (block.attn.c_attn for block in model.transformer.h)
    second.weight = first.weight
    message = (
        "transformer.h.0.attn.c_attn.weight: several modules share it, and splitting would separate them"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        split_fused(model)


def test_a_module_that_is_used_twice_is_split_once() -> None:
    model = NanoGPT(layers=1)
    tokens = torch.arange(5)[None]
    model.transformer.h.append(model.transformer.h[0])
    before = model(tokens)
    split_fused(model)
    assert torch.equal(model(tokens), before)
    assert len([name for name, _ in model.named_parameters() if "original" in name]) == 6
    merge_fused(model)
    assert torch.equal(model(tokens), before)


def test_a_fused_weight_with_a_parametrization_of_its_own_is_refused_by_name() -> None:
    attention = NanoAttention()
    parametrizations.weight_norm(attention.c_attn)
    with pytest.raises(ValueError, match=r"c_attn\.weight: it is already parametrized by something else"):
        split_fused(attention)
    assert parametrize.is_parametrized(attention.c_attn, "weight")
    # Its originals still belong to the fused weight, whole.
    assert set(classify(attention).values()) == {"qkv", "vo"}
