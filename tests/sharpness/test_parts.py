"""Sums over parts: which elements belong to which, and that they are added up exactly."""

from __future__ import annotations

import copy

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockwise_lr import Block, classify, split_fused
from blockwise_lr.blocks.block import PartSlice
from blockwise_lr.sharpness.gradient_sums import GradientSum
from blockwise_lr.sharpness.parameter_parts import OUTSIDE, ParameterParts, cut, layer_of
from support.architectures import build
from support.cases import CASES, gpt2, llama, mixtral

BY_NAME = {case.name: case for case in CASES}


def parts_of(model):
    return ParameterParts(model, None, distributed=False)


@pytest.mark.parametrize("case", CASES, ids=BY_NAME)
def test_parts_cover_every_trainable_element_once(case):
    model = case.model()
    parts = parts_of(model)
    assert sum(part.numel for part in parts.parts) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert len({part.name for part in parts.parts}) == len(parts)
    # A random gradient: the parts' sums of squares are the blocks' of the split model.
    gradients = [torch.randn(p.shape, dtype=torch.float64) for p in parts.parameters]
    assert parts.sums(gradients).sum() == pytest.approx(
        float(sum(g.square().sum() for g in gradients)), rel=1e-12
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.split], ids=lambda case: case.name)
def test_parts_of_fused_weights_have_the_blocks_and_sizes_that_splitting_gives(case):
    def sizes(parts):
        found = {}
        for part in parts.parts:
            found[part.block] = found.get(part.block, 0) + part.numel
        return found

    fused, split = sizes(parts_of(case.model())), sizes(parts_of(split_fused(case.model())))
    assert fused == split


def test_parts_that_lie_head_by_head_are_summed_where_they_lie():
    model = build("gpt_neox")
    whole, split = parts_of(model), parts_of(split_fused(copy.deepcopy(model)))
    names = dict(model.named_parameters())
    gradients = [torch.randn(p.shape, dtype=torch.float64) for p in whole.parameters]
    fused = dict(zip(whole.names, gradients))
    taken = []
    for name, parameter in zip(split.names, split.parameters):
        if (at := name.partition(".parametrizations."))[1]:
            leaf, index = at[2].split(".original")
            weight = fused[f"{at[0]}.{leaf}"]
            heads = weight.reshape(4, 3, 8, *weight.shape[1:])[:, int(index)]
            taken.append(heads.reshape(parameter.shape))
        else:
            assert parameter.shape == names[name].shape
            taken.append(fused[name])
    expected = {part.block: 0.0 for part in split.parts}
    for part, total in zip(split.parts, split.sums(taken)):
        expected[part.block] += float(total)
    found = dict.fromkeys(expected, 0.0)
    for part, total in zip(whole.parts, whole.sums(gradients)):
        found[part.block] += float(total)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_fused_weight_is_summed_where_its_parts_lie():
    model = gpt2()
    parts = parts_of(model)
    weight = dict(model.named_parameters())["transformer.h.0.attn.c_attn.weight"]
    gradients = [None] * len(parts.parameters)
    index = next(i for i, p in enumerate(parts.parameters) if p is weight)
    gradients[index] = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape)
    found = {part.name: float(total) for part, total in zip(parts.parts, parts.sums(gradients))}
    for part, columns in zip("qkv", gradients[index].chunk(3, dim=1)):  # a Conv1D has its outputs as columns
        assert found.pop(f"transformer.h.0.attn.c_attn.weight:{part}") == pytest.approx(
            float(columns.square().sum()), rel=1e-12
        )
    assert set(found.values()) == {0.0}
    names = {part.name: part.block for part in parts.parts}
    assert [names[f"transformer.h.0.attn.c_attn.bias:{part}"] for part in "qkv"] == [
        Block.QK,
        Block.QK,
        Block.VO,
    ]


def test_products_are_of_each_part_with_its_own():
    parts = parts_of(gpt2())
    a, b = ([torch.randn(p.shape, dtype=torch.float64) for p in parts.parameters] for _ in range(2))
    polarised = (parts.sums([x + y for x, y in zip(a, b)]) - parts.sums([x - y for x, y in zip(a, b)])) / 4
    torch.testing.assert_close(parts.sums(a, b), polarised, rtol=1e-9, atol=1e-9)


def test_parameters_without_gradient_count_as_zero():
    parts = parts_of(mixtral())
    assert parts.sums([None] * len(parts.parameters)).tolist() == [0.0] * len(parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_kept_in_more(dtype):
    # A million equal squares: a sum in float32, one by one, would stall. Neighbours may be added in float32 first.
    model = nn.Linear(1000, 1000, bias=False).to(dtype)
    parts = ParameterParts(model, classify(model, {".": Block.FFN}), distributed=False)
    gradient = torch.full((1000, 1000), 1e-3, dtype=dtype)
    exact = 1e6 * float(gradient[0, 0].double()) ** 2
    sums = parts.sums([gradient])
    assert sums.dtype == torch.float64
    assert float(sums[0]) == pytest.approx(exact, rel=1e-12 if dtype is torch.float64 else 1e-6)
    assert float(parts.sums([gradient], [gradient.clone()])[0]) == pytest.approx(exact, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.sampled_from([(1, 1), (3, 5), (16, 16), (17, 31), (2, 700)]),
        elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
    )
)
def test_sums_of_squares_agree_with_numpys(values):
    model = nn.Linear(values.shape[1], values.shape[0], bias=False)
    parts = ParameterParts(model, classify(model, {".": Block.FFN}), distributed=False)
    exact = np.square(values.astype(np.float64)).sum()
    transposed = torch.from_numpy(values.T.copy()).T  # not contiguous
    for tensor in (torch.from_numpy(values), transposed):
        assert float(parts.sums([tensor])[0]) == pytest.approx(exact, rel=1e-6, abs=1e-30)
        assert float(parts.sums([tensor], [tensor.clone()])[0]) == pytest.approx(exact, rel=1e-12)


def test_gradients_are_added_one_by_one_and_half_precision_in_float32():
    one, two = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-9], dtype=torch.bfloat16)
    model = nn.ParameterList([torch.zeros(1)] * 4)
    parts = ParameterParts(model, classify(model, {".": Block.OTHER}), distributed=False)
    total = GradientSum(parts)
    total.add(range(4), [one, None, one, None])
    assert total.tensors == [one, None, one, None]
    total.add(range(2), [two, two])
    total.add([0], [two])
    total.add(range(4), [None] * 4)
    assert total.tensors[0].tolist() == [1 + 2.0**-8]
    assert total.tensors[1] is two
    assert total.tensors[2] is one
    assert total.tensors[3] is None
    assert one.item() == 1.0


def test_two_parameters_with_one_gradient_tensor_are_added_up_apart():
    shared = torch.ones(3)
    model = nn.ParameterList([torch.zeros(3)] * 2)
    total = GradientSum(ParameterParts(model, classify(model, {".": Block.OTHER}), distributed=False))
    for _ in range(3):
        total.add(range(2), [shared, shared])
    assert [tensor.tolist() for tensor in total.tensors] == [[3.0] * 3] * 2
    assert shared.tolist() == [1.0] * 3


def test_what_is_cut_is_a_view():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert cut(tensor, None) is tensor
    assert cut(tensor, PartSlice(1, 2, 2)).tolist() == [[2, 3], [6, 7], [10, 11]]
    by_head = cut(tensor, PartSlice(1, 1, 1, repeats=2))
    assert by_head.flatten().tolist() == [1, 3, 5, 7, 9, 11]
    by_head.zero_()
    assert tensor[0].tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts.0.weight", "model.layers.3"),
        ("transformer.h.11.attn.c_attn.bias", "transformer.h.11"),
        ("0.weight", "0"),
        ("lm_head.weight", OUTSIDE),
        ("transformer.wte.weight", OUTSIDE),
        ("conv1.weight", OUTSIDE),
    ],
)
def test_the_layer_is_the_name_up_to_the_first_number(name, layer):
    assert layer_of(name) == layer


def test_wrappers_leave_no_trace_in_the_names():
    plain = [part.name for part in parts_of(llama()).parts]
    assert [part.name for part in parts_of(torch.compile(llama(), backend="eager")).parts] == plain


def test_a_block_map_made_before_splitting_does_not_serve_after_it():
    model = gpt2()
    blocks = classify(model)
    with pytest.raises(
        KeyError, match="no parameter named .*c_attn.parametrizations.weight.original0.* was classified"
    ):
        ParameterParts(split_fused(model), blocks, distributed=False)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(
        ValueError, match="GPT2LMHeadModel has no parameter with requires_grad=True, so there is nothing"
    ):
        parts_of(gpt2().requires_grad_(False))
