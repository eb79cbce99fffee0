import warnings
from functools import partial

import numpy as np
import pytest
import torch

from blockwise_lr import build_optimizer, cosine_schedule, param_groups, set_lr
from support import tiny_models
from support.nano import NanoGPT

BASE = 1e-3
RATIOS = {"norm": 6, "vo": 0.7, "ffn": 1, "qk": 2, "emb": 4}


gpt2 = partial(tiny_models.gpt2, n_layer=1, split=True)


def rates(optimizer):
    return {group["block"]: float(group["lr"]) for group in optimizer.param_groups}


def at(base):
    return pytest.approx({**{block: ratio * base for block, ratio in RATIOS.items()}, "pos": base})


def test_every_block_gets_its_ratio_of_the_rate_that_is_set():
    optimizer = torch.optim.AdamW(param_groups(gpt2(), lr=BASE), lr=BASE)
    for lr in (3e-4, 0, 7, np.float32(1e-4), torch.tensor(2e-4)):
        set_lr(optimizer, lr)
        assert rates(optimizer) == at(float(lr))


@pytest.mark.parametrize("name", ["adamw", "muon", "adam-mini", "sgd", "lion", "soap", "torch.optim:RAdam"])
def test_it_works_on_every_kind_of_optimizer(name):
    optimizer = build_optimizer(name, gpt2(), lr=BASE)
    set_lr(optimizer, 5e-4)
    assert rates(optimizer) == at(5e-4)


def test_rates_that_are_tensors_are_filled_in_place():
    optimizer = torch.optim.AdamW(param_groups(gpt2(), lr=BASE), lr=BASE)
    held = []
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
        held.append(group["lr"])
    for lr in (5e-4, torch.tensor(5e-4)):
        set_lr(optimizer, 1.0)
        set_lr(optimizer, lr)
        assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, held))
        assert rates(optimizer) == at(5e-4)


def test_a_compiled_step_sees_the_new_rate():
    parameter = torch.nn.Parameter(torch.zeros(2))
    group = {"params": [parameter], "lr": torch.tensor(1.0), "lr_ratio": 4.0, "block": "vo"}
    optimizer = torch.optim.SGD([group], lr=1.0)
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=False)
    for lr in (1.0, 0.5, 0.25):
        parameter.grad = torch.ones(2)
        before = parameter.detach().clone()
        set_lr(optimizer, lr)
        step()
        assert torch.allclose(before - parameter, torch.tensor(4 * lr))


def test_groups_without_a_ratio_count_as_one():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    set_lr(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_it_reaches_the_optimizer_inside_accelerates_wrapper():
    accelerate = pytest.importorskip("accelerate")
    optimizer = torch.optim.AdamW(param_groups(gpt2(), lr=BASE), lr=BASE)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    set_lr(prepared, 5e-4)
    assert rates(optimizer) == at(5e-4)


def test_it_reaches_the_optimizer_inside_a_wrapper_that_knows_only_optimizer():
    class Engine:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = torch.optim.AdamW(param_groups(gpt2(), lr=BASE), lr=BASE)
    set_lr(Engine(Engine(optimizer)), 5e-4)
    assert rates(optimizer) == at(5e-4)


def test_a_wrapper_with_stale_copies_of_the_groups_is_no_hindrance():
    class Lightning:  # copies the optimizer's attributes when it is made
        def __init__(self, optimizer):
            self.__dict__ = {**optimizer.__dict__, "optimizer": optimizer}

    optimizer = torch.optim.AdamW(param_groups(gpt2(), lr=BASE), lr=BASE)
    wrapper = Lightning(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # makes new dictionaries
    set_lr(wrapper, 5e-4)
    assert rates(optimizer) == at(5e-4)


def test_constant_decay_shrinks_every_block_as_the_base_rate_would_also_after_a_schedule():
    optimizer = torch.optim.AdamW(param_groups(gpt2(), lr=BASE, decay="constant"), lr=BASE)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=BASE / 20)
    for _ in range(15):
        optimizer.step()
        schedule.step()
    assert any(g["weight_decay"] != g["peak_weight_decay"] for g in optimizer.param_groups)
    set_lr(optimizer, 5e-4)
    assert [g["lr"] * g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([5e-5] * 6)


@pytest.mark.parametrize("bad", ["1e-3", -1e-3, float("nan"), float("inf"), None, True])
def test_a_rate_that_is_none_is_refused_with_what_to_type(bad):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(ValueError, match=r"lr is .*; expected a finite number .*: set_lr\(optimizer, 3e-4\)"):
        set_lr(optimizer, bad)


@pytest.mark.parametrize("bad", [[{"params": [], "lr": 1.0}], torch.nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_refused_by_its_kind(bad):
    with pytest.raises(ValueError, match=r"set_lr got a (list|Linear); expected an optimizer .*set_lr\(opt"):
        set_lr(bad, 1e-3)


def test_nanogpts_loop_with_set_lr_trains_every_block_at_its_own_rate_without_a_warning():
    torch.manual_seed(0)
    model = NanoGPT()
    optimizer = torch.optim.AdamW(param_groups(model, BASE, {"emb": 10}), BASE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            set_lr(optimizer, BASE * step / 4)
            optimizer.zero_grad(set_to_none=True)
            model(torch.arange(8)[None]).sum().backward()
            optimizer.step()
    found = rates(optimizer)
    assert found["emb"] == pytest.approx(10 * found["norm"])
