import pytest
import torch
from torch import nn

from blockwise_lr import DEFAULT_RATIOS, Block, classify, cosine_schedule, param_groups, split_fused
from blockwise_lr.optim import cosine, initial_scales
from blockwise_lr.train.ratio_text import parse_ratios
from support import tiny_models
from support.tiny_models import gpt2


def llama(tied=False):
    return tiny_models.llama(
        vocab_size=64, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied
    )


@pytest.mark.parametrize(
    "model", [llama(), llama(tied=True), split_fused(gpt2())], ids=["llama", "tied", "gpt2"]
)
def test_every_parameter_is_in_exactly_one_group_and_no_group_is_empty(model):
    groups = param_groups(model, lr=1e-3)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert all(g["params"] for g in groups)
    assert [n for g in groups for n in g["names"]] != []
    named = dict(model.named_parameters())
    for group in groups:
        assert [id(named[name]) for name in group["names"]] == [id(p) for p in group["params"]]


def test_groups_carry_the_metadata_that_other_programs_read():
    groups = param_groups(llama(), lr=1e-3)
    assert groups[0]["block"] == "norm"
    for group in groups:
        assert type(group["block"]) is str  # a Block would not load under weights_only
        assert group["lr"] == group["initial_lr"] == group["lr_ratio"] * 1e-3
        assert group["lr_ratio"] == DEFAULT_RATIOS.get(Block(group["block"]), 1)
        assert group["weight_decay"] == 0.1
        assert "param_names" not in group


def test_one_group_per_block_and_decay():
    blocks = [
        (g["block"], g["weight_decay"]) for g in param_groups(split_fused(gpt2()), lr=1e-3, no_decay="1d")
    ]
    assert len(blocks) == len(set(blocks))
    assert ("qk", 0.1) in blocks
    assert ("qk", 0.0) in blocks  # the biases of queries and keys
    assert ("norm", 0.1) not in blocks


def test_no_decay_takes_blocks():
    groups = param_groups(llama(), lr=1e-3, no_decay=["norm", Block.EMB])
    assert {g["block"]: g["weight_decay"] for g in groups} == {
        "norm": 0.0, "emb": 0.0, "qk": 0.1, "vo": 0.1, "ffn": 0.1, "head": 0.1,
    }  # fmt: skip


def test_constant_decay_divides_by_the_ratio_so_that_lr_times_decay_is_the_bases():
    for group in param_groups(llama(), lr=1e-3, decay="constant"):
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3 * 0.1)


def test_without_decay_there_is_one_group_a_block():
    assert len(param_groups(split_fused(gpt2()), lr=1e-3, weight_decay=0.0, no_decay="1d")) == 6


def decay_by_block(groups):
    return {g["block"]: g["weight_decay"] for g in groups}


def test_a_block_has_the_weight_decay_it_was_given_and_the_others_keep_the_default():
    groups = param_groups(llama(), lr=1e-3, weight_decay={"emb": 0, Block.FFN: 0.3})
    assert decay_by_block(groups) == {"norm": 0.1, "emb": 0.0, "qk": 0.1, "vo": 0.1, "ffn": 0.3, "head": 0.1}
    assert decay_by_block(param_groups(llama(), lr=1e-3, weight_decay={})) == decay_by_block(
        param_groups(llama(), lr=1e-3)
    )


def test_the_documented_way_to_give_every_block_a_value():
    groups = param_groups(llama(), lr=1e-3, weight_decay={**dict.fromkeys(Block, 0.05), "norm": 0})
    assert decay_by_block(groups) == {
        "norm": 0.0, "emb": 0.05, "qk": 0.05, "vo": 0.05, "ffn": 0.05, "head": 0.05,
    }  # fmt: skip


@pytest.mark.parametrize("decay", ["coupled", "constant"])
def test_the_name_of_a_way_to_decay_is_the_default_decay_in_that_way(decay):
    named = param_groups(llama(), lr=1e-3, weight_decay=decay)
    spelled = param_groups(llama(), lr=1e-3, weight_decay=0.1, decay=decay)
    assert decay_by_block(named) == decay_by_block(spelled)
    assert {g["decay"] for g in named} == {decay}


def test_constant_decay_divides_each_blocks_own_by_its_ratio():
    decays = {"emb": 0.2, "norm": 0, "ffn": 0.3}
    for group in param_groups(llama(), lr=1e-3, weight_decay=decays, decay="constant"):
        expected = 1e-3 * decays.get(group["block"], 0.1)
        assert group["lr"] * group["weight_decay"] == pytest.approx(expected)


def test_constant_decay_by_block_stays_that_of_the_base_learning_rate_at_every_step():
    decays = {"emb": 0.2, "norm": 0, "ffn": 0.3}
    optimizer = torch.optim.AdamW(param_groups(llama(), 1e-3, weight_decay=decays, decay="constant"), lr=1e-3)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=10, floor=1e-4)
    for step in range(1, 10):
        optimizer.step()
        schedule.step()
        base = cosine(step, peak=1e-3, warmup_steps=2, total_steps=10, floor=1e-4)
        for group in optimizer.param_groups:
            expected = base * decays.get(group["block"], 0.1)
            assert group["lr"] * group["weight_decay"] == pytest.approx(expected)


def test_an_adamw_step_without_gradient_shrinks_each_block_by_its_own_decay():
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = param_groups(model, lr=1e-3, ratios={"ffn": 2}, weight_decay={"emb": 0, "ffn": 0.5})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups, lr=1e-3).step()
    factors = {"emb": 1.0, "ffn": 1 - 2e-3 * 0.5}
    for group in groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            torch.testing.assert_close(p, before[name] * factors.get(group["block"], 1 - 1e-3 * 0.1))


def test_no_decay_is_stronger_than_a_blocks_weight_decay():
    groups = param_groups(llama(), lr=1e-3, weight_decay={"norm": 0.3, "emb": 0.3}, no_decay=["norm"])
    assert decay_by_block(groups)["norm"] == 0.0
    assert decay_by_block(groups)["emb"] == 0.3


def test_a_fused_weight_takes_the_decay_that_its_parts_share_or_that_qkv_was_given():
    for decays, expected in [
        ({"qk": 0.2, "vo": 0.2}, 0.2),
        ({"qk": 0.2, "qkv": 0.4}, 0.4),
        ({"ffn": 0}, 0.1),
    ]:
        assert decay_by_block(param_groups(gpt2(), 1e-3, {}, weight_decay=decays))["qkv"] == expected


def test_a_fused_weight_whose_parts_need_different_decays_is_refused_by_name():
    message = (
        r"h\.0\.attn\.c_attn\.weight is a fused QKV weight whose parts need different weight decays "
        r"\(q 0\.2, k 0\.2, v 0\.1\).*call split_fused\(model\) first.*or name qkv in weight_decay"
    )
    with pytest.raises(ValueError, match=message):
        param_groups(gpt2(), 1e-3, {}, weight_decay={"qk": 0.2})


def test_frozen_parameters_are_left_out():
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    assert "head" not in [g["block"] for g in param_groups(model, lr=1e-3)]


def test_a_model_without_norms_starts_with_another_block():
    model = nn.ModuleDict({"wte": nn.Embedding(8, 4)})
    assert [g["block"] for g in param_groups(model, lr=1e-3)] == ["emb"]


def test_an_unsplit_fused_weight_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"h\.0\.attn\.c_attn\.weight is a fused QKV weight.*q x2.*v x0\.7.*call split_fused\(model\) first",
    ):
        param_groups(gpt2(), lr=1e-3)


def test_ratios_by_name_refuse_an_unsplit_fused_weight_too():
    with pytest.raises(ValueError, match=r"call split_fused\(model\) first"):
        param_groups(gpt2(), 1e-3, parse_ratios("paper"))


def test_no_decay_reaches_an_unsplit_fused_weight_if_it_names_all_its_parts():
    groups = param_groups(gpt2(), 1e-3, {}, no_decay=["qk", "vo"])
    assert [g["weight_decay"] for g in groups if g["block"] == "qkv"] == [0.0]
    with pytest.raises(
        ValueError, match=r"c_attn\.weight is a fused QKV weight, and no_decay names only some of its"
    ):
        param_groups(gpt2(), 1e-3, {}, no_decay=["qk"])


def test_an_unsplit_fused_weight_is_fine_where_its_parts_agree():
    model = gpt2()
    groups = param_groups(model, lr=1e-3, ratios={"qk": 2, "vo": 2, "emb": 3})
    (qkv,) = (g for g in groups if g["block"] == "qkv")
    assert qkv["lr_ratio"] == 2
    assert len(qkv["params"]) == 4


def test_a_ratio_given_to_qkv_itself_is_the_users_own_decision():
    groups = param_groups(gpt2(), lr=1e-3, ratios={"qkv": 5, "emb": 3})
    assert next(g for g in groups if g["block"] == "qkv")["lr"] == pytest.approx(5e-3)


def test_a_block_map_of_your_own_is_used():
    model = llama()
    blocks = classify(model, overrides={r"lm_head": Block.EMB})
    groups = param_groups(model, lr=1e-3, blocks=blocks)
    assert "lm_head.weight" in next(g for g in groups if g["block"] == "emb")["names"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 0}, "lr is 0; expected a finite number above 0"),
        ({"lr": float("nan")}, "lr is nan; expected"),
        ({"lr": 1e-3, "weight_decay": -1}, "weight_decay is -1; expected a finite number, 0 or above"),
        ({"lr": 1e-3, "decay": "fixed"}, 'decay is \'fixed\'; expected "coupled" or "constant"'),
        ({"lr": 1e-3, "no_decay": "norm"}, "no_decay is 'norm'; expected a list of blocks"),
        ({"lr": 1e-3, "no_decay": None}, "no_decay is None; expected a list of blocks"),
        ({"lr": 1e-3, "no_decay": True}, "no_decay is True; expected a list of blocks"),
        (
            {"lr": 1e-3, "no_decay": ["norms"]},
            "no_decay: 'norms' is not a valid Block; the blocks are emb, qk",
        ),
        ({"lr": 1e-3, "weight_decay": {"mlp": 0}}, "weight_decay: 'mlp' is not a block; the blocks are emb"),
        (
            {"lr": 1e-3, "weight_decay": {"emb": -1}},
            "weight_decay: emb is -1; expected a finite number, 0 or above",
        ),
        (
            {"lr": 1e-3, "weight_decay": {"emb": "0"}},
            "weight_decay: emb is '0'; expected a finite number, 0 or above",
        ),
        (
            {"lr": 1e-3, "weight_decay": "none"},
            "weight_decay is 'none'; expected a number, numbers by block such as .*\"coupled\" or",
        ),
        (
            {"lr": 1e-3, "weight_decay": "coupled", "decay": "constant"},
            'weight_decay is "coupled" and decay is "constant"; expected one of the two',
        ),
        ({"lr": 1e-3, "ratios": {"mlp": 2}}, "ratios: 'mlp' is not a block"),
    ],
)
def test_bad_settings_are_refused_with_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        param_groups(llama(), **kwargs)


@pytest.mark.parametrize("take", [lambda m, b: param_groups(m, 1e-3, blocks=b), initial_scales])
def test_overrides_in_place_of_a_block_map_are_refused(take):
    with pytest.raises(TypeError, match=r"blocks is a dict; expected a BlockMap: .*overrides=\{"):
        take(llama(), {"lm_head": "emb"})


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no parameter with requires_grad=True"):
        param_groups(llama().requires_grad_(False), lr=1e-3)


def test_optimizer_state_survives_weights_only_loading(tmp_path):
    model = llama()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3), lr=1e-3)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    fresh = torch.optim.AdamW(param_groups(model, lr=1e-3), lr=1e-3)
    fresh.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert fresh.param_groups[1]["names"] == optimizer.param_groups[1]["names"]
