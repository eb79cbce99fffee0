"""Every block is clipped to its own norm, in one pass, and what is not finite is named."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import Block, BlockMap, classify, clip_grad_norm_by_block, param_groups, split_fused
from blockwise_lr.optim import gradients as gradients_module
from blockwise_lr.optim import nonfinite_gradients
from support import tiny_models

LIMIT = 0.56  # in the middle of the norms of that training
GPT2_BLOCKS = {Block.EMB, Block.QK, Block.VO, Block.FFN, Block.NORM, Block.POS}


def gpt2(split=True, seed=0):
    return tiny_models.gpt2(seed=seed, split=split).eval()  # no dropout, so that two can be trained alike


def small():
    return nn.ModuleDict({"wte": nn.Embedding(9, 4), "ln_f": nn.LayerNorm(4)})


def with_gradients(model, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm_of(tensors, norm_type=2.0):
    """The literal one, in float64: the norm of all elements in one row."""
    row = torch.cat([t.double().flatten() for t in tensors]).abs()
    return float(row.max() if norm_type == math.inf else (row**norm_type).sum() ** (1 / norm_type))


def clipped_literally(model, limits, norm_type=2.0):
    blocks, found = classify(model), gradients(model)
    for block, limit in limits.items():
        inside = [name for name in found if blocks[name] is block]
        norm = norm_of([found[name] for name in inside], norm_type)
        for name in inside:
            found[name] = found[name] * min(1.0, limit / (norm + 1e-6))
    return found


def test_a_block_is_scaled_by_its_limit_over_its_norm_in_closed_form():
    model = small()
    model["wte"].weight.grad = torch.full((9, 4), 2.0)  # norm 12
    model["ln_f"].weight.grad = torch.tensor([3.0, 0, 0, 0])
    model["ln_f"].bias.grad = torch.tensor([0, 4.0, 0, 0])  # norm 5 together
    norms = clip_grad_norm_by_block(model, {"emb": 3.0, Block.NORM: 10.0})
    assert {block: float(norm) for block, norm in norms.items()} == {Block.EMB: 12.0, Block.NORM: 5.0}
    torch.testing.assert_close(model["wte"].weight.grad, torch.full((9, 4), 0.5))
    assert model["ln_f"].weight.grad.tolist() == [3, 0, 0, 0]  # below its limit: untouched
    clip_grad_norm_by_block(model, 1.0)
    torch.testing.assert_close(model["ln_f"].weight.grad, torch.tensor([0.6, 0, 0, 0]))
    torch.testing.assert_close(model["ln_f"].bias.grad, torch.tensor([0, 0.8, 0, 0]))


def test_with_one_block_training_is_that_of_torchs_own_clipping_to_the_bit():
    ours, theirs = gpt2(), gpt2()
    blocks = classify(ours, overrides={r".": Block.FFN})
    assert set(blocks.values()) == {Block.FFN}
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (ours, theirs)]
    scaled = 0
    for step in range(40):
        ids = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), LIMIT)
        found = clip_grad_norm_by_block(ours, LIMIT, blocks=blocks)
        assert torch.equal(found[Block.FFN], expected)
        scaled += bool(expected > LIMIT)
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert 5 < scaled < 40  # both sides of the limit were seen


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_a_split_gpt2_is_clipped_as_by_the_literal_sum_over_each_block(norm_type):
    model = with_gradients(gpt2())
    limits = {Block.EMB: 0.1, Block.QK: 1.0, Block.VO: 5.0, Block.FFN: 1e6}
    expected = clipped_literally(model, limits, norm_type)
    before, blocks = gradients(model), classify(model)
    norms = clip_grad_norm_by_block(model, limits, norm_type=norm_type)
    assert set(norms) == GPT2_BLOCKS
    for block, norm in norms.items():
        assert norm.shape == ()
        inside = [g for name, g in before.items() if blocks[name] is block]
        assert float(norm) == pytest.approx(norm_of(inside, norm_type), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_one_number_is_the_limit_of_each_block_and_not_of_all_together():
    model = with_gradients(gpt2())
    clip_grad_norm_by_block(model, 0.25)
    norms = clip_grad_norm_by_block(model, math.inf)
    assert {block: float(norm) for block, norm in norms.items()} == pytest.approx(
        dict.fromkeys(GPT2_BLOCKS, 0.25), rel=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-4, 1e4),
    limits=st.dictionaries(
        st.sampled_from(sorted(GPT2_BLOCKS)), st.floats(1e-3, 1e3) | st.just(math.inf), max_size=6
    ),
)
def test_no_block_is_above_its_limit_none_is_turned_and_the_others_are_untouched(seed, scale, limits):
    model = with_gradients(MODEL, seed, scale)
    before = gradients(model)
    norms = clip_grad_norm_by_block(model, limits, blocks=BLOCKS)
    after = gradients(model)
    for block in GPT2_BLOCKS:
        old = torch.cat([g.flatten() for name, g in before.items() if BLOCKS[name] is block]).double()
        new = torch.cat([g.flatten() for name, g in after.items() if BLOCKS[name] is block]).double()
        limit = limits.get(block, math.inf)
        assert float(new.norm()) <= limit * (1 + 1e-5)
        if norms[block] <= limit * (1 - 1e-5) - 1e-6:
            assert torch.equal(new, old)
        else:
            assert float(new.norm()) == pytest.approx(limit, rel=1e-3)
            torch.testing.assert_close(new / new.norm(), old / old.norm(), rtol=1e-5, atol=1e-7)


MODEL = gpt2()
BLOCKS = classify(MODEL)


def test_an_unlimited_block_is_untouched_even_if_its_norm_is_infinite():
    model = with_gradients(small())
    model["wte"].weight.grad[0, 0] = math.inf
    before = gradients(model)
    norms = clip_grad_norm_by_block(model, math.inf)
    assert norms[Block.EMB] == math.inf
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())


def test_parameters_without_gradient_are_left_out():
    model = with_gradients(small())
    groups = param_groups(model, lr=1e-3)
    model["wte"].weight.grad = None
    assert set(clip_grad_norm_by_block(model, 1.0)) == {Block.NORM}
    assert set(clip_grad_norm_by_block(model, 1.0, blocks=groups)) == {Block.NORM}
    model["ln_f"].requires_grad_(False)
    assert clip_grad_norm_by_block(model, 1.0) == {}
    assert clip_grad_norm_by_block(model.requires_grad_(True).zero_grad() or model, 1.0) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_two_dtypes_are_clipped_together(dtype):
    model = small()
    model["ln_f"].bias = nn.Parameter(model["ln_f"].bias.to(dtype))
    with_gradients(model)
    expected = clipped_literally(model, {Block.NORM: 0.5, Block.EMB: 0.5})
    clip_grad_norm_by_block(model, 0.5)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == (dtype if name == "ln_f.bias" else torch.float32)
        torch.testing.assert_close(gradient, expected[name].to(gradient.dtype), rtol=1e-2, atol=1e-4)


# How it is done: once over the gradients, no classification anew, no waiting
# ------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_one_call_measures_all_gradients_and_one_a_block_scales_them():
    model = with_gradients(gpt2())
    with Calls() as calls:
        clip_grad_norm_by_block(model, 0.5)
    assert calls.count["_foreach_norm"] == 2  # each gradient, and each block
    assert calls.count["_foreach_mul_"] == 1 + len(
        GPT2_BLOCKS
    )  # the factors, and the gradients of each block
    assert calls.count["linalg_vector_norm"] == 1  # all blocks
    assert not {"mul_", "_local_scalar_dense"} & set(calls.count)


def test_nothing_waits_for_the_device_unless_an_error_is_asked_for():
    with FakeTensorMode():  # has shapes and no values, so whatever asks for a value raises
        model = split_fused(GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2)))
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        norms = clip_grad_norm_by_block(model, {"ffn": 0.5, "qk": 1.0})
        assert set(norms) == GPT2_BLOCKS
        with pytest.raises(DataDependentOutputException):
            clip_grad_norm_by_block(model, 0.5, error_if_nonfinite=True)


def test_a_model_is_classified_once_until_its_parameters_change(monkeypatch):
    seen = []
    monkeypatch.setattr(gradients_module, "classify", lambda model: seen.append(0) or classify(model))
    model = with_gradients(gpt2(split=False))
    for _ in range(3):
        assert Block.QKV in clip_grad_norm_by_block(model, 1.0)
    assert len(seen) == 1
    with_gradients(split_fused(model))
    for _ in range(3):
        assert set(clip_grad_norm_by_block(model, 1.0)) == GPT2_BLOCKS
    assert len(seen) == 2
    clip_grad_norm_by_block(model, 1.0, blocks=classify(model))
    clip_grad_norm_by_block(copy.deepcopy(model), 1.0)  # without gradients, and another model
    assert len(seen) == 3


def test_the_groups_of_an_optimizer_say_the_blocks_too():
    mapped, grouped = with_gradients(gpt2()), with_gradients(gpt2())
    optimizer = torch.optim.AdamW(param_groups(grouped, lr=1e-3), lr=1e-3)
    expected = clip_grad_norm_by_block(mapped, 0.5)
    norms = clip_grad_norm_by_block(grouped, 0.5, blocks=optimizer.param_groups)
    assert {b: float(n) for b, n in norms.items()} == {b: float(n) for b, n in expected.items()}
    found = gradients(grouped)
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients(mapped).items())


def test_groups_that_differ_in_decay_are_one_block():
    model = with_gradients(gpt2())
    groups = param_groups(model, lr=1e-3, no_decay="1d")
    expected = norm_of([p.grad for g in groups if g["block"] == "qk" for p in g["params"]])
    assert len([g for g in groups if g["block"] == "qk"]) == 2
    norms = clip_grad_norm_by_block(model, 0.5, blocks=groups)
    assert float(norms[Block.QK]) == pytest.approx(expected, rel=1e-6)


def test_a_compiled_model_is_clipped_with_the_map_of_the_plain_one():
    model = gpt2()
    blocks = classify(model)
    compiled = torch.compile(with_gradients(model), backend="eager")
    assert set(clip_grad_norm_by_block(compiled, 1.0, blocks=blocks)) == GPT2_BLOCKS


def test_unscaled_gradients_of_a_grad_scaler_are_clipped_as_without_one():
    plain, scaled = gpt2(), gpt2()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizers = [torch.optim.AdamW(param_groups(m, lr=1e-3), lr=1e-3) for m in (plain, scaled)]
    for step in range(5):
        ids = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(step))
        plain(input_ids=ids, labels=ids).loss.backward()
        clip_grad_norm_by_block(plain, 0.3)
        optimizers[0].step()
        scaler.scale(scaled(input_ids=ids, labels=ids).loss).backward()
        scaler.unscale_(optimizers[1])
        assert clip_grad_norm_by_block(scaled, 0.3)[Block.EMB] > 0.3
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    # A power of two scales exactly.
    assert all(map(torch.equal, plain.parameters(), scaled.parameters()))


def test_a_grad_scaler_still_leaves_out_a_step_that_overflowed():
    model = gpt2()
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3), lr=1e-3)
    ids = torch.arange(12)[None]
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_by_block(model, 0.3)
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, model.parameters(), before))
    assert scaler.get_scale() == 2.0**126


# Not finite
# ------------------------------------------------------------------------------------------------------


def broken():
    model = with_gradients(gpt2())
    layers = model.transformer.h
    layers[0].mlp.c_fc.weight.grad[0, :3] = math.nan
    layers[0].mlp.c_fc.weight.grad[1, 0] = -math.inf
    for linear in (layers[0].mlp.c_proj, layers[1].mlp.c_fc):
        linear.weight.grad[0, 0] = math.inf
        linear.bias.grad[0] = math.nan
    model.transformer.wpe.weight.grad[0, 0] = math.inf
    return model


def test_a_gradient_that_is_not_finite_is_refused_by_block_and_parameter_and_nothing_is_clipped():
    model = broken()
    before = gradients(model)
    message = (
        r"the gradient is not finite, and nothing was clipped\. "
        r"pos: transformer\.wpe\.weight \(0 nan, 1 inf of 96\); "
        r"ffn: transformer\.h\.0\.mlp\.c_fc\.weight \(3 nan, 1 inf of 256\), "
        r"transformer\.h\.0\.mlp\.c_proj\.weight \(0 nan, 1 inf of 256\), "
        r"transformer\.h\.0\.mlp\.c_proj\.bias \(1 nan, 0 inf of 8\) and 2 more\. "
        r"Leave this step out with optimizer\.zero_grad\(\), or lower the learning rate .*error_if_nonfinite=False"
    )
    with pytest.raises(RuntimeError, match=message):
        clip_grad_norm_by_block(model, 0.5, error_if_nonfinite=True)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient.nan_to_num(7, 8, 9), before[name].nan_to_num(7, 8, 9))


def test_a_gradient_that_is_not_finite_spoils_its_own_block_only():
    model, fine = broken(), with_gradients(gpt2())
    norms = clip_grad_norm_by_block(model, 0.5)
    clip_grad_norm_by_block(fine, 0.5)
    assert [block.value for block, norm in norms.items() if not norm.isfinite()] == ["pos", "ffn"]
    blocks, expected = classify(model), gradients(fine)
    for name, gradient in gradients(model).items():
        if blocks[name] is Block.FFN:
            assert gradient.isnan().any()
        elif blocks[name] is not Block.POS:
            assert torch.equal(gradient, expected[name])


def test_finite_gradients_are_clipped_where_an_error_is_asked_for():
    model, fine = with_gradients(gpt2()), with_gradients(gpt2())
    clip_grad_norm_by_block(model, 0.5, error_if_nonfinite=True)
    clip_grad_norm_by_block(fine, 0.5)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), fine.parameters()))
    assert clip_grad_norm_by_block(gpt2(), 0.5, error_if_nonfinite=True) == {}


def test_a_norm_that_overflows_is_told_apart_from_elements_that_do():
    model = with_gradients(small())
    model["wte"].weight.grad.fill_(1e30)
    message = "emb: every element is finite, but the norm of order 2 overflows float32. Leave this step"
    with pytest.raises(RuntimeError, match=message):
        clip_grad_norm_by_block(model, 1.0, error_if_nonfinite=True)
    assert nonfinite_gradients(model) == {}


def test_nonfinite_gradients_names_the_parameters_of_each_block():
    model = broken()
    assert nonfinite_gradients(model) == {
        Block.POS: ["transformer.wpe.weight"],
        Block.FFN: [
            "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight",
            "transformer.h.0.mlp.c_proj.bias", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias",
        ],
    }  # fmt: skip
    assert nonfinite_gradients(model, classify(model)) == nonfinite_gradients(
        model, param_groups(model, lr=1e-3)
    )
    assert nonfinite_gradients(with_gradients(gpt2())) == {}
    assert nonfinite_gradients(gpt2()) == {}


# What is refused
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_norm", "message"),
    [
        (
            0,
            r"max_norm is 0; expected a number above 0 \(inf: measured and not clipped\), or such numbers by",
        ),
        (-1.0, "max_norm is -1.0; expected a number above 0"),
        (math.nan, "max_norm is nan; expected a number above 0"),
        ("1", "max_norm is '1'; expected a number above 0"),
        (None, "max_norm is None; expected a number above 0"),
        ([1.0], r"max_norm is \[1.0\]; expected a number above 0"),
        (True, "max_norm is True; expected a number above 0"),
        ({"mlp": 1}, "max_norm: 'mlp' is not a block; the blocks are emb, qk"),
        ({"ffn": 0}, "max_norm: ffn is 0; expected a number above 0"),
        ({"ffn": None}, "max_norm: ffn is None; expected a number above 0"),
        ({"ffn": math.nan}, "max_norm: ffn is nan; expected a number above 0"),
    ],
)
def test_bad_limits_are_refused_with_what_was_expected(max_norm, message):
    with pytest.raises(ValueError, match=message):
        clip_grad_norm_by_block(with_gradients(small()), max_norm)


@pytest.mark.parametrize("norm_type", [0, -2.0, math.nan, None, "inf"])
def test_a_norm_that_is_none_is_refused(norm_type):
    with pytest.raises(ValueError, match="norm_type is .*; expected a number above 0, such as 2 or inf"):
        clip_grad_norm_by_block(with_gradients(small()), 1.0, norm_type=norm_type)


def test_limits_of_the_parts_of_a_fused_weight_are_refused_by_name():
    model = with_gradients(gpt2(split=False))
    message = (
        r"h\.0\.attn\.c_attn\.weight is a fused QKV weight, and max_norm names only blocks of its parts: call"
    )
    with pytest.raises(ValueError, match=message):
        clip_grad_norm_by_block(model, {"qk": 1.0, "ffn": 1.0})
    before = gradients(model)
    norms = clip_grad_norm_by_block(model, {"qkv": 0.5, "vo": 0.5, "ffn": 0.5})
    assert norms[Block.QKV] > 0.5
    after = gradients(model)
    assert not torch.equal(
        after["transformer.h.0.attn.c_attn.weight"], before["transformer.h.0.attn.c_attn.weight"]
    )
    clip_grad_norm_by_block(model, {"ffn": 0.5})  # names no part


def test_groups_without_blocks_are_refused():
    model = with_gradients(small())
    with pytest.raises(ValueError, match="a parameter group has no block: make them with param_groups"):
        clip_grad_norm_by_block(model, 1.0, blocks=[{"params": list(model.parameters())}])


def test_a_parameter_that_the_map_does_not_know_is_named():
    with pytest.raises(KeyError, match="no parameter named 'wte.weight' was classified"):
        clip_grad_norm_by_block(with_gradients(small()), 1.0, blocks=BlockMap({}))


def test_fsdp_1_is_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(
        ValueError, match=r"\(FSDP1\) flattens parameters.*use torch\.distributed\.fsdp\.fully_shard"
    ):
        clip_grad_norm_by_block(FullyShardedDataParallel(), 1.0)
