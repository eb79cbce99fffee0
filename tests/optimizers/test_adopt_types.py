"""adopt_state: every optimizer gets a state as it would have made it, and says what it could not get."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim import Optimizer

from blockwise_lr import AdamMini, adopt_state, build_optimizer, merge_fused, param_groups, split_fused
from blockwise_lr.optimizers.registry import OPTIMIZERS
from optimizers.test_adam_mini import same, train
from support.nano import NanoGPT

LR = 1e-3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRAINED = [name for name in OPTIMIZERS if name != "sophia"]  # it needs create_graph
# SOAP's matrices have no half precision.
PAIRS = [
    pytest.param(
        before,
        after,
        dtype,
        marks=[] if dtype == "bf16" and {"adamw", "adam-mini"} & {before, after} else [pytest.mark.slow],
    )
    for before in TRAINED
    for after in TRAINED
    for dtype in DTYPES
    if dtype == "fp32" or (dtype == "bf16" and "soap" not in (before, after))
]


def nano(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return split_fused(NanoGPT(**settings)).to(dtype)


def made(name: str, model: nn.Module, **options: Any) -> Optimizer:
    return build_optimizer(name, model, LR, {}, **options)


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(param_groups(model, LR, {}), lr=LR, **options)


def kinds(value: Any) -> Any:
    """What a state is made of, without its values."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.stride()
    if isinstance(value, (list, tuple)):
        return [kinds(each)[:-1] if isinstance(each, Tensor) else type(each) for each in value]
    return {key: kinds(each) for key, each in value.items()} if isinstance(value, dict) else type(value)


def own_state(model: nn.Module, make: Any) -> Iterator[tuple[str, Any]]:
    """By name, what the optimizer itself keeps after a step."""
    model = copy.deepcopy(model)
    optimizer = make(model)
    train(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        yield name, kinds(dict(optimizer.state.get(parameter, {})))


def check_as_made(model: nn.Module, optimizer: Optimizer, make: Any) -> int:
    """How many parameters have a state, each as the optimizer itself makes it."""
    expected = dict(own_state(model, make))
    adopted = {name: dict(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
    for name, state in adopted.items():
        if state:
            assert kinds(state) == expected[name], name
    return sum(map(bool, adopted.values()))


@pytest.mark.parametrize(("before", "after", "dtype"), PAIRS)
def test_every_optimizer_goes_on_from_every_other_in_its_own_types(
    before: str, after: str, dtype: str
) -> None:
    model = nano(DTYPES[dtype])
    old = made(before, model)
    train(model, old, 3)
    new = made(after, model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adopt_state(old.state_dict(), model, new)
    carried = check_as_made(model, new, lambda copied: made(after, copied))
    fresh = [str(each.message) for each in said if "start without state" in str(each.message)]
    needs = any(bool(state) for _, state in own_state(model, lambda copied: made(after, copied)))
    assert bool(fresh) == (needs and carried < len(list(model.parameters())))
    train(model, new, 2, first=3)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_same_optimizer_goes_on_to_the_bit(name: str, dtype: str) -> None:
    if name == "soap" and dtype == "bf16":
        pytest.skip("SOAP's matrices have no half precision")
    model = nano(DTYPES[dtype])
    plain = copy.deepcopy(model)
    train(plain, made(name, plain), 6)
    first = made(name, model)
    train(model, first, 3)
    second = made(name, model)
    adopt_state(first.state_dict(), model, second)
    train(model, second, 3, first=3)
    assert same(model, plain)


FLAGS: list[dict[str, Any]] = [
    {"fused": True}, {"foreach": True}, {"foreach": False}, {"amsgrad": True}, {"fused": True, "amsgrad": True},
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", FLAGS)
@pytest.mark.parametrize("after", FLAGS)
def test_adamw_goes_on_with_other_flags(before: dict[str, Any], after: dict[str, Any], dtype: str) -> None:
    model = nano(DTYPES[dtype])
    old = adamw(model, **before)
    train(model, old, 2)
    new = adamw(model, **after)
    adopt_state(old.state_dict(), model, new)
    count = len(list(model.parameters()))
    assert check_as_made(model, new, lambda copied: adamw(copied, **after)) == count
    assert {float(state["step"]) for state in new.state.values()} == {2.0}
    train(model, new, 1, first=2)


@pytest.mark.parametrize("flag", ["fused", "capturable"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam])
def test_a_step_on_the_device_lies_where_the_parameters_lie(kind: type[Optimizer], flag: str) -> None:
    if flag == "fused" and kind is torch.optim.NAdam:
        pytest.skip("torch's NAdam has no fused step")
    model = nano(tied=False)  # what is tied comes apart on its way to another device
    old = adamw(model, fused=False)
    train(model, old, 2)
    elsewhere = copy.deepcopy(model).to("meta")
    new = kind(param_groups(elsewhere, LR, {}), lr=LR, **{flag: True})  # type: ignore[call-arg]
    adopt_state(old.state_dict(), elsewhere, new)
    scalars = [v for state in new.state.values() for v in state.values() if v.ndim == 0]
    assert {(v.device.type, v.dtype) for v in scalars} == {("meta", torch.float32)}
    assert {state["exp_avg"].device.type for state in new.state.values()} == {"meta"}
    plain = kind(param_groups(elsewhere, LR, {}), lr=LR)  # type: ignore[call-arg]
    adopt_state(old.state_dict(), elsewhere, plain)
    assert {state["step"].device.type for state in plain.state.values()} == {"cpu"}


def test_a_step_on_the_device_goes_back_to_a_step_on_the_cpu() -> None:
    model = nano()
    old = adamw(model, fused=True)
    train(model, old, 2)
    state = old.state_dict()
    for each in state["state"].values():
        each["step"] = each["step"].to(torch.float64)
    new = adamw(model, foreach=True)
    adopt_state(state, model, new)
    assert {each["step"].dtype for each in new.state.values()} == {torch.float32}


def test_adam_mini_on_bf16_takes_moments_in_float32_that_go_on_moving() -> None:
    model = nano(torch.bfloat16)
    old = adamw(model)
    train(model, old, 2)
    new = AdamMini(param_groups(model, LR, {}), lr=LR, betas=(0.9, 0.999))
    adopt_state(old.state_dict(), model, new)
    before = {p: state["exp_avg_sq"].clone() for p, state in new.state.items()}
    assert {value.dtype for value in before.values()} == {torch.float32}
    train(model, new, 1, first=2)
    assert all((new.state[p]["exp_avg_sq"] != value).any() for p, value in before.items())


def test_adam_mini_to_adamw_on_bf16_steps() -> None:
    model = nano(torch.bfloat16)
    old = AdamMini(param_groups(model, LR, {}), lr=LR)
    train(model, old, 2)
    new = adamw(model, fused=True)
    adopt_state(old.state_dict(), model, new)
    train(model, new, 1, first=2)
    assert {state["exp_avg"].dtype for state in new.state.values()} == {torch.bfloat16}


def test_nadams_product_is_the_one_it_would_have() -> None:
    model = nano()
    old, twin = adamw(model), made("nadamw", model)
    train(model, old, 3)
    train(copied := copy.deepcopy(model), reference := made("nadamw", copied), 3)
    adopt_state(old.state_dict(), model, twin)
    product = next(iter(twin.state.values()))["mu_product"]
    torch.testing.assert_close(product, next(iter(reference.state.values()))["mu_product"])


def test_what_cannot_be_carried_is_named() -> None:
    model = nano()
    old = adamw(model)
    train(model, old, 1)
    new = made("sgd", model)
    text = (
        r"the old state does not have what SGD keeps \(momentum_buffer\) for 17 parameters \(transformer\.h"
    )
    with pytest.warns(UserWarning, match=text):
        adopt_state(old.state_dict(), model, new)
    assert not new.state


def test_an_optimizer_or_a_distributed_state_dict_is_a_source_too() -> None:
    model = nano()
    old = adamw(model)
    train(model, old, 2)
    full = get_optimizer_state_dict(model, old, options=StateDictOptions(full_state_dict=True))
    for group in full["param_groups"]:
        del group["names"]
    for source in (old, full):
        new = adamw(model)
        adopt_state(source, model, new)
        for p, state in old.state.items():
            assert torch.equal(new.state[p]["exp_avg"], state["exp_avg"])


def test_a_wrapped_optimizer_takes_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nano()
    old = adamw(model)
    train(model, old, 1)
    new = AdamMini(param_groups(model, LR, {}), lr=LR)
    adopt_state(old.state_dict(), model, accelerate.Accelerator(cpu=True).prepare_optimizer(new))
    assert next(iter(new.state.values()))["step"] == 1


def test_no_hook_schedule_or_random_number_sees_the_trial() -> None:
    model = nano()
    old = adamw(model)
    train(model, old, 1)
    new = adamw(model)
    calls: list[str] = []
    new.register_step_pre_hook(lambda *_: calls.append("pre"))
    new.register_step_post_hook(lambda *_: calls.append("post"))
    schedule = torch.optim.lr_scheduler.LambdaLR(new, lambda step: 1.0)
    before, groups = torch.get_rng_state(), copy.deepcopy(new.state_dict()["param_groups"])
    weights = copy.deepcopy(model)
    gradients = [p.grad for p in model.parameters()]
    adopt_state(old.state_dict(), model, new)
    assert calls == []
    assert not getattr(schedule.optimizer, "_opt_called", False)
    assert torch.equal(torch.get_rng_state(), before)
    assert new.state_dict()["param_groups"] == groups
    assert same(weights, model)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients))


# Frozen and thawed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adam-mini", "lion", "ademamix"])
def test_frozen_parameters_are_left_out_where_that_is_said(name: str) -> None:
    model = nano()
    old = made(name, model)
    train(model, old, 2)
    model.transformer.wte.weight.requires_grad_(False)
    new = made(name, model)
    with pytest.raises(ValueError) as caught:
        adopt_state(old.state_dict(), model, new)
    assert "moments of 1 parameters that the new optimizer does not train (transformer.wte.weight)" in str(
        caught.value
    )
    assert not new.state
    typed = re.search(r'changed="\w+"', str(caught.value))
    assert typed is not None
    eval(f"adopt_state(old.state_dict(), model, new, {typed[0]})")
    assert len(new.state) == len(old.state) - 1
    train(model, new, 1, first=2)


@pytest.mark.parametrize("name", ["adamw", "adam-mini", "lion", "ademamix"])
def test_thawed_parameters_start_anew_where_that_is_said(name: str) -> None:
    model = nano()
    model.transformer.wte.weight.requires_grad_(False)
    old = made(name, model)
    train(model, old, 2)
    model.transformer.wte.weight.requires_grad_(True)
    new = made(name, model)
    with pytest.raises(ValueError) as caught:
        adopt_state(old.state_dict(), model, new)
    assert "the old state has nothing for transformer.wte.weight" in str(caught.value)
    typed = re.search(r'changed="\w+"', str(caught.value))
    assert typed is not None
    eval(f"adopt_state(old.state_dict(), model, new, {typed[0]})")
    assert len(new.state) == len(old.state)
    train(model, new, 1, first=2)


def test_one_group_of_all_parameters_frozen_ones_too_is_understood() -> None:
    torch.manual_seed(0)
    model = NanoGPT()
    model.transformer.wte.weight.requires_grad_(False)
    old = torch.optim.AdamW(model.parameters(), lr=LR)
    train(model, old, 1)
    new = adamw(split_fused(model))
    adopt_state(old.state_dict(), model, new)
    assert len(new.state) == sum(p.requires_grad for p in model.parameters())


def test_parts_frozen_apart_come_together_without_state() -> None:
    torch.manual_seed(0)
    model = split_fused(NanoGPT())
    key = model.transformer.h[0].attn.c_attn.parametrizations.weight.original1
    key.requires_grad_(False)
    old = adamw(model)
    train(model, old, 1)
    key.requires_grad_(True)
    merge_fused(model)
    new = adamw(model)
    with pytest.raises(ValueError, match="the old state has nothing for transformer.h.0.attn.c_attn.weight"):
        adopt_state(old.state_dict(), model, new)
    adopt_state(old.state_dict(), model, new, changed="adopt")
    assert model.transformer.h[0].attn.c_attn.weight not in new.state
    train(model, new, 1, first=1)


def test_another_models_state_is_refused_whatever_is_said() -> None:
    model, other = nano(), nano(layers=2)
    old = adamw(other)
    train(other, old, 1)
    with pytest.raises(ValueError, match="load the .* that was saved with"):
        adopt_state(old.state_dict(), model, adamw(model), changed="adopt")
    with pytest.raises(ValueError, match=r"changed is 'ignore'; expected \"error\" or \"adopt\""):
        adopt_state(old.state_dict(), model, adamw(model), changed="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adafactor", "lion", "adan", "ademamix", "nadamw", "sgd"])
def test_the_moments_of_fused_weights_are_cut_and_joined_for_every_optimizer(name: str) -> None:
    torch.manual_seed(0)
    model = NanoGPT()
    old = build_optimizer(name, model, LR, {})
    train(model, old, 2)
    new = build_optimizer(name, split_fused(model), LR, {})
    adopt_state(old, model, new)
    check = check_as_made(model, new, lambda copied: build_optimizer(name, copied, LR, {}))
    assert check == len(list(model.parameters()))
    train(model, new, 1, first=2)
    back = build_optimizer(name, merge_fused(model), LR, {})
    adopt_state(new, model, back)
    train(model, back, 1, first=3)
    assert check_as_made(model, back, lambda copied: build_optimizer(name, copied, LR, {})) == len(
        list(model.parameters())
    )


@settings(max_examples=25, deadline=None)
@given(
    names=st.tuples(st.sampled_from(TRAINED), st.sampled_from(TRAINED), st.sampled_from(TRAINED)),
    steps=st.integers(0, 3),
)
def test_any_chain_of_optimizers_goes_on(names: tuple[str, ...], steps: int) -> None:
    model, done = nano(), 0
    old = None
    for name in names:
        new = made(name, model)
        if old is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adopt_state(old, model, new)
            check_as_made(model, new, lambda copied, name=name: made(name, copied))
        train(model, new, steps, first=done)
        done, old = done + steps, new
    assert all(bool(p.isfinite().all()) for p in model.parameters())
