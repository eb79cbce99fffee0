"""The warning that something has overwritten every group's rate with one number."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import (
    build_optimizer,
    cosine_schedule,
    param_groups,
    scale_by_block,
    set_lr,
    split_fused,
    wsd_schedule,
)
from support.nano import NanoGPT

BASE = 1e-3
RATIOS = {"norm": 1, "ffn": 6, "emb": 10}  # q, k and v at one rate: nanoGPT's weight of all three stays whole


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NanoGPT()


def optimizer_of(model, ratios=RATIOS, **settings):
    return torch.optim.AdamW(param_groups(model, BASE, ratios, **settings), BASE)


def train(model, optimizer, steps, before=None, after=None):
    """The warnings of a training loop of nanoGPT's form."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if before:
                before(step)
            output = model(torch.arange(8)[None])
            getattr(output, "logits", output).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if after:
                after(step)
    return [str(each.message) for each in caught if "one learning rate" in str(each.message)], caught


def overwrite(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def nanogpt_lr(step, warmup=3, total=20):
    if step < warmup:
        return BASE * step / warmup  # 0 at first
    return BASE * (1 - 0.9 * (step - warmup) / (total - warmup))


def test_nanogpts_own_loop_warns_once_and_says_what_to_type(model):
    optimizer = optimizer_of(model)
    messages, caught = train(model, optimizer, 20, lambda step: overwrite(optimizer, nanogpt_lr(step)))
    assert len(messages) == 1
    assert "all 6 parameter groups are at one learning rate, 0.000333333, though" in messages[0]
    assert "(norm 1, emb 10, vo 1, ffn 6, pos 1, qkv 1)" in messages[0]
    assert "set_lr(optimizer, lr)" in messages[0]
    assert "scheduler = scale_by_block(scheduler)" in messages[0]
    assert "from blockwise_lr import scale_by_block, set_lr" in messages[0]
    assert [each.filename for each in caught if "one learning rate" in str(each.message)] == [__file__]


def test_what_the_warning_says_to_type_works(model):
    optimizer = optimizer_of(model)
    assert not train(model, optimizer, 20, lambda step: set_lr(optimizer, nanogpt_lr(step)))[0]


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "adam-mini", "lion", "adafactor"])
def test_it_is_seen_with_every_optimizer(name):
    model = split_fused(
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=12, n_embd=8, n_layer=1, n_head=2))
    )
    optimizer = build_optimizer(name, model, BASE)
    assert len(train(model, optimizer, 3, lambda step: overwrite(optimizer, 5e-4))[0]) == 1


def test_one_cycle_is_warned_of_unless_it_is_wrapped_also_after_accelerate_was_imported(model):
    import accelerate  # noqa: F401 (it silences warnings that seem to come from torch's schedulers)

    optimizer = optimizer_of(model)
    schedule = OneCycleLR(optimizer, max_lr=BASE, total_steps=12)
    messages, caught = train(model, optimizer, 6, after=lambda step: schedule.step())
    assert len(messages) == 1
    assert [each.filename for each in caught if "one learning rate" in str(each.message)] == [__file__]

    optimizer = optimizer_of(model)
    schedule = scale_by_block(OneCycleLR(optimizer, max_lr=BASE, total_steps=12))
    assert not train(model, optimizer, 11, after=lambda step: schedule.step())[0]


def test_rates_that_are_tensors_are_seen_too(model):
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])

    def fill(step):
        for group in optimizer.param_groups:
            group["lr"].fill_(1e-3)

    assert len(train(model, optimizer, 3, fill)[0]) == 1


def test_a_loop_that_takes_over_in_the_middle_is_seen(model):
    optimizer = optimizer_of(model)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 40)
    messages, _ = train(
        model,
        optimizer,
        20,
        lambda step: step >= 10 and overwrite(optimizer, 1e-4),
        after=lambda step: schedule.step(),
    )
    assert len(messages) == 1


def test_an_engine_that_overwrites_the_rates_of_our_schedule_is_seen(model):
    optimizer = optimizer_of(model)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=BASE / 20)
    messages, _ = train(
        model, optimizer, 8, lambda step: overwrite(optimizer, 3e-4), after=lambda step: schedule.step()
    )
    assert len(messages) == 1


def test_it_is_seen_after_the_optimizers_state_was_loaded_and_through_accelerate(model):
    accelerate = pytest.importorskip("accelerate")
    optimizer = optimizer_of(model)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)  # loads its own state: new dictionaries
    assert len(train(model, prepared, 3, lambda step: overwrite(prepared, 5e-4))[0]) == 1


@pytest.mark.parametrize("make", [cosine_schedule, wsd_schedule])
@pytest.mark.parametrize("floor_mode", ["shared", "proportional"])
def test_our_schedules_never_warn_although_all_blocks_end_at_one_floor(model, make, floor_mode):
    optimizer = optimizer_of(model)
    schedule = make(optimizer, warmup_steps=2, total_steps=12, floor=BASE / 20, floor_mode=floor_mode)
    assert not train(model, optimizer, 20, after=lambda step: schedule.step())[0]
    assert len({group["lr"] for group in optimizer.param_groups}) == (1 if floor_mode == "shared" else 3)


def test_a_run_that_is_resumed_at_the_shared_floor_does_not_warn(model):
    optimizer = optimizer_of(model)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=12, floor=BASE / 20)
    train(model, optimizer, 14, after=lambda step: schedule.step())
    states = optimizer.state_dict(), schedule.state_dict()
    for order in (0, 1):
        optimizer = optimizer_of(model)
        schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=12, floor=BASE / 20)
        for each, state in ((optimizer, states[0]), (schedule, states[1]))[:: -1 if order else 1]:
            each.load_state_dict(state)
        assert not train(model, optimizer, 3, after=lambda step, resumed=schedule: resumed.step())[0]


def test_a_decay_to_one_floor_is_no_overwriting(model):
    optimizer = optimizer_of(model)
    schedule = CosineAnnealingLR(optimizer, 30, eta_min=BASE / 20)
    assert not train(model, optimizer, 31, after=lambda step: step < 30 and schedule.step())[0]
    assert len({round(group["lr"], 12) for group in optimizer.param_groups}) == 1


def test_equal_ratios_and_rates_of_zero_are_no_reason(model):
    uniform = optimizer_of(model, {})
    assert not train(model, uniform, 3, lambda step: overwrite(uniform, 5e-4))[0]
    fourfold = optimizer_of(model, dict.fromkeys(["norm", "vo", "ffn", "qk", "emb", "pos"], 4))
    assert not train(model, fourfold, 3, lambda step: overwrite(fourfold, 5e-4))[0]
    frozen = optimizer_of(model)
    assert not train(model, frozen, 3, lambda step: overwrite(frozen, 0.0))[0]


@pytest.mark.slow
def test_nothing_is_placed_when_the_library_is_imported_and_little_is_left_afterwards():
    code = """
import torch, blockwise_lr
from torch.optim import optimizer as o
assert not o._global_optimizer_pre_hooks
model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(16, 4), "ln_f": torch.nn.LayerNorm(4)})
blockwise_lr.param_groups(model, 1e-3, {})
assert not o._global_optimizer_pre_hooks, "equal ratios need no watch"
optimizer = torch.optim.AdamW(blockwise_lr.param_groups(model, 1e-3), 1e-3)
assert len(o._global_optimizer_pre_hooks) == 1
optimizer.step()
assert not o._global_optimizer_pre_hooks
blockwise_lr.param_groups(torch.nn.ModuleDict({"e": torch.nn.Embedding(16, 4), "n": torch.nn.LayerNorm(4)}), 1e-3)
optimizer.step(); optimizer.step()  # nobody can step the parameters of a model that is gone
assert not o._global_optimizer_pre_hooks
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_compiled_step_is_compiled_as_often_as_without_the_watch(model):
    def graphs(ratios):
        optimizer = optimizer_of(model, ratios)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(lambda: optimizer.step(), backend="eager")
        for _ in range(6):
            model(torch.arange(8)[None]).square().mean().backward()
            compiled()
            optimizer.zero_grad(set_to_none=False)
        return dict(torch._dynamo.utils.counters["stats"])

    assert graphs(RATIOS)["unique_graphs"] == graphs(dict.fromkeys(RATIOS, 1))["unique_graphs"]
