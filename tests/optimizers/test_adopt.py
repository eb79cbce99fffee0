"""adopt_state: a run that changes its groups, its layout or its optimizer in the middle goes on as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from blockwise_lr import AdamMini, adopt_state, merge_fused, param_groups, split_fused
from optimizers.test_adam_mini import same, train
from support.architectures import build
from support.cases import gpt2
from support.nano import NanoGPT

LR = 1e-2


def adamw(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.1)


def uniform(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    return param_groups(model, LR, {}, **settings)


def one_group(model: nn.Module) -> torch.optim.AdamW:
    return adamw(model.parameters())


def named_group(model: nn.Module) -> torch.optim.AdamW:
    return adamw(model.named_parameters())


def trainers_pair(model: nn.Module) -> torch.optim.AdamW:
    """The two groups that transformers' Trainer makes."""
    decays = Trainer.get_decay_parameter_names(None, model)
    named = list(model.named_parameters())
    return adamw(
        [
            {"params": [p for n, p in named if n in decays], "weight_decay": 0.1},
            {"params": [p for n, p in named if n not in decays], "weight_decay": 0.0},
        ]
    )


def decaying_as_trainers(model: nn.Module) -> list[dict[str, Any]]:
    """Groups by block that decay what Trainer's pair decays: no norms and no biases."""
    return uniform(model, no_decay="1d")


@pytest.mark.parametrize("make", [gpt2, lambda: build("gpt_neox"), lambda: build("llama")])
@pytest.mark.parametrize(
    ("before", "groups"),
    [(one_group, uniform), (named_group, uniform), (trainers_pair, decaying_as_trainers)],
)
def test_a_run_split_in_the_middle_goes_on_to_the_bit_and_back(
    make: Callable[[], nn.Module], before: Callable[[nn.Module], Any], groups: Callable[[nn.Module], Any]
) -> None:
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    reference = before(plain)
    train(plain, reference, 6)

    first = before(model)
    train(model, first, 2)
    second = adamw(groups(split_fused(model)))
    adopt_state(first.state_dict(), model, second)
    train(model, second, 2, first=2)
    third = adamw(groups(merge_fused(model)))
    adopt_state(second.state_dict(), model, third)
    train(model, third, 2, first=4)
    assert same(model, plain)


@pytest.mark.parametrize("make", [gpt2, lambda: build("gpt_neox")])
@pytest.mark.parametrize(("before", "groups"), [(one_group, uniform), (trainers_pair, decaying_as_trainers)])
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "one frozen"])
def test_a_plain_run_on_a_model_that_was_split_before_goes_on_to_the_bit(
    make: Callable[[], nn.Module],
    before: Callable[[nn.Module], Any],
    groups: Callable[[nn.Module], Any],
    frozen: bool,
) -> None:
    torch.manual_seed(0)
    model = split_fused(make())
    next(model.parameters()).requires_grad_(not frozen)
    plain = copy.deepcopy(model)
    train(plain, before(plain), 4)

    first = before(model)
    train(model, first, 2)
    second = adamw(groups(model))
    adopt_state(first.state_dict(), model, second)
    train(model, second, 2, first=2)
    assert same(model, plain)


def test_the_lost_moments_would_be_seen() -> None:
    torch.manual_seed(0)
    model = gpt2()
    plain = copy.deepcopy(model)
    train(plain, one_group(plain), 4)
    train(model, one_group(model), 2)
    train(model, adamw(uniform(split_fused(model))), 2, first=2)
    assert not same(merge_fused(model), plain)


def test_names_may_be_given() -> None:
    torch.manual_seed(0)
    model = NanoGPT()
    named = list(reversed(list(model.named_parameters())))
    old = adamw([p for _, p in named])
    train(model, old, 2)
    new = adamw(uniform(model))
    adopt_state(old.state_dict(), model, new, names=[[name for name, _ in named]])
    for _, parameter in named:
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])
        assert new.state[parameter]["step"] == 2


def by_hand(second: Tensor, partition: list[int]) -> Tensor:
    """The mean of AdamW's v over each piece of a matrix."""
    rows, columns = second.shape[0] // partition[0], second.shape[1] // partition[1]
    means = [
        [second[i : i + rows, j : j + columns].mean() for j in range(0, second.shape[1], columns)]
        for i in range(0, second.shape[0], rows)
    ]
    return torch.tensor(means, dtype=second.dtype)


def test_from_adamw_to_adam_mini_averages_and_back_repeats() -> None:
    torch.manual_seed(0)
    model = NanoGPT().double()
    old = one_group(model)
    train(model, old, 2)
    fused = model.transformer.h[0].attn.c_attn.weight
    query = old.state[fused]["exp_avg_sq"][:8].clone()
    mini = AdamMini(uniform(split_fused(model)))
    adopt_state(old.state_dict(), model, mini)
    part = model.transformer.h[0].attn.c_attn.parametrizations.weight.original0
    torch.testing.assert_close(mini.state[part]["exp_avg_sq"], by_hand(query, [2, 1]))
    train(model, mini, 1, first=2)

    heads = mini.state[part]["exp_avg_sq"].clone()
    back = adamw(uniform(merge_fused(model)))
    adopt_state(mini.state_dict(), model, back)
    second = back.state[model.transformer.h[0].attn.c_attn.weight]["exp_avg_sq"]
    assert second.shape == fused.shape
    assert torch.equal(second[:8], heads.repeat_interleave(4, 0).expand(8, 8))
    train(model, back, 1, first=3)


def test_a_parameter_that_was_never_stepped_has_no_state() -> None:
    model = NanoGPT()
    old = one_group(model)
    new = adamw(uniform(model))
    adopt_state(old.state_dict(), model, new)
    assert not new.state


def test_an_adopted_state_is_a_copy() -> None:
    model = NanoGPT()
    old = one_group(model)
    train(model, old, 1)
    new = adamw(uniform(model))
    adopt_state(old.state_dict(), model, new)
    before = {id(p): state["exp_avg"].clone() for p, state in old.state.items()}
    train(model, new, 1)
    assert all(torch.equal(state["exp_avg"], before[id(p)]) for p, state in old.state.items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.clear(), "the old state has the keys ; expected an optimizer's state_dict()"),
        (lambda s: s["param_groups"][0]["params"].pop(), "and have [13] parameters where the model has 14: exp"),
        (
            lambda s: s["state"][0].update(exp_avg=torch.ones(3, 8)),
            "exp_avg of transformer.wte.weight has shape (3, 8), and its parameter (40, 8); expected equal shapes",
        ),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(
    change: Callable[[Any], Any], text: str
) -> None:
    model = NanoGPT(tied=False)
    old = one_group(model)
    train(model, old, 1)
    new = adamw(uniform(model))
    state = copy.deepcopy(old.state_dict())
    change(state)
    with pytest.raises(ValueError, match=re.escape(text)):
        adopt_state(state, model, new)
    assert not new.state


def test_a_moment_that_cannot_be_cut_as_its_weight_was_is_refused() -> None:
    model = NanoGPT()
    old = one_group(model)
    train(model, old, 1)
    state = copy.deepcopy(old.state_dict())
    place = [name for name, _ in model.named_parameters()].index("transformer.h.0.attn.c_attn.weight")
    state["state"][place]["exp_avg"] = torch.ones(5, 8)
    with pytest.raises(ValueError, match=r"a moment of shape \(5, 8\) cannot be split into \(8, 8, 8\)"):
        adopt_state(state, model, adamw(uniform(split_fused(model))))


def test_another_models_state_and_groups_without_names_are_refused() -> None:
    model, other = NanoGPT(), NanoGPT(layers=2)
    old = adamw(uniform(other))
    with pytest.raises(
        ValueError, match=r"has moments of 10 parameters that the new optimizer does not train \(tr"
    ):
        adopt_state(old.state_dict(), model, adamw(uniform(model)))
    with pytest.raises(ValueError, match=r"the old state has nothing for transformer\.h\.1\.ln_1\.weight"):
        adopt_state(adamw(uniform(model)).state_dict(), other, adamw(uniform(other)))
    with pytest.raises(ValueError, match="a group of the new optimizer has no names: make the groups with"):
        adopt_state(one_group(model).state_dict(), model, one_group(model))
    with pytest.raises(
        ValueError, match=r"names are given for groups of \[1\] parameters, and the old state has"
    ):
        adopt_state(one_group(model).state_dict(), model, adamw(uniform(model)), names=[["a"]])
