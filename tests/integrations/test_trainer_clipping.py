"""BlockwiseTrainer(clip_by_block=...): in the place of Trainer's clipping, once, logged, resumed to the bit."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from transformers import Trainer, TrainerCallback

from blockwise_lr import Block, clip_grad_norm_by_block, cosine_schedule, param_groups
from blockwise_lr.integrations import trainer_clipping as clipping
from blockwise_lr.integrations.trainer_clipping import check_engine
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from integrations.test_transformers import LR, STEPS, Tokens, arguments, logged
from support import tiny_models
from support.device_work import counted_work

LIMITS = {"emb": 0.05, "ffn": 0.02, "norm": 100.0}


gpt2 = partial(tiny_models.gpt2, split=True, dropout=0.0)


def trained(folder, model=None, callbacks=(), limits=LIMITS, **changes):
    trainer = BlockwiseTrainer(
        gpt2() if model is None else model,
        arguments(folder, **changes),
        train_dataset=Tokens(),
        clip_by_block=limits,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


class Gradients(TrainerCallback):
    """The norm of each block at the optimizer's step, as the optimizer gets it."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        norms = clip_grad_norm_by_block(kwargs["model"], math.inf, blocks=kwargs["optimizer"].param_groups)
        self.norms.append({block.value: float(norm) for block, norm in norms.items()})


class Poisoned(BlockwiseTrainer):
    """One element of one gradient has another value in one step."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step == POISONED_STEP - 1:
            model.get_parameter(POISONED_NAME).grad.view(-1)[0] = self.poison
        return loss


POISONED_STEP, POISONED_NAME = 6, "transformer.h.1.mlp.c_fc.weight"


class Recorded(BlockwiseTrainer):
    """Keeps its batches, and takes plain means over micro-batches, so that a loop can repeat it."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.model_accepts_loss_kwargs = False
        self.batches = [*getattr(self, "batches", []), inputs]
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("max_grad_norm", [1e-4, 1.0, 0.0])
def test_the_optimizer_gets_gradients_clipped_by_block_and_not_globally(tmp_path, max_grad_norm):
    seen = Gradients()
    trainer = trained(tmp_path, callbacks=[seen], max_grad_norm=max_grad_norm)
    rows = logged(trainer)
    assert len(rows) == len(seen.norms) == STEPS
    clipped = 0
    for row, after in zip(rows, seen.norms, strict=True):
        before = {name.removeprefix("grad_norm/"): row[name] for name in row if name.startswith("grad_norm/")}
        assert set(before) == {"emb", "qk", "vo", "ffn", "norm", "pos"}
        for block, norm in before.items():
            # A global clipping at 1e-4 besides would make all of these smaller.
            assert after[block] == pytest.approx(min(norm, LIMITS.get(block, math.inf)), rel=1e-4)
            clipped += norm > LIMITS.get(block, math.inf)
        assert row["grad_norm"] == pytest.approx(math.hypot(*before.values()), rel=1e-5)
    assert clipped > STEPS


def test_without_it_trainer_clips_globally_as_ever(tmp_path):
    seen = Gradients()
    trainer = trained(tmp_path, callbacks=[seen], limits=None, max_grad_norm=0.01)
    assert all(math.hypot(*norms.values()) == pytest.approx(0.01, rel=1e-3) for norms in seen.norms)
    assert not any(name.startswith("grad_norm/") for row in logged(trainer) for name in row)


def test_it_trains_as_a_loop_of_your_own_with_the_function_to_the_bit(tmp_path):
    settings = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = Recorded(gpt2(), settings, train_dataset=Tokens(), clip_by_block=LIMITS)
    trainer.train()
    model = gpt2()
    optimizer = torch.optim.AdamW(param_groups(model, lr=LR), lr=LR, fused=True)  # as Trainer makes it
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=STEPS, floor=LR / 20)
    assert len(trainer.batches) == 2 * STEPS
    for first, second in zip(trainer.batches[::2], trainer.batches[1::2]):
        for batch in (first, second):
            (model(**batch).loss / 2).backward()
        clip_grad_norm_by_block(model, LIMITS)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def test_a_resumed_trainer_ends_with_the_same_weights_and_norms_to_the_bit(tmp_path):
    whole = trained(tmp_path / "a")
    saving = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path / "b", **saving)
    resumed = BlockwiseTrainer(
        gpt2(), arguments(tmp_path / "b", **saving), train_dataset=Tokens(), clip_by_block=LIMITS
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    for row, alone in zip(logged(resumed)[4:], logged(whole)[4:], strict=True):
        norms = {name: value for name, value in alone.items() if name.startswith("grad_norm")}
        assert len(norms) == 7
        assert norms == {name: value for name, value in row.items() if name.startswith("grad_norm")}


def test_gradients_of_fp16_are_unscaled_once_and_before_they_are_clipped(tmp_path, monkeypatch):
    trainer = BlockwiseTrainer(
        gpt2(), arguments(tmp_path, max_grad_norm=1.0), train_dataset=Tokens(), clip_by_block=LIMITS
    )
    done = []
    clip = trainer._clipping.clip
    monkeypatch.setattr(trainer.accelerator, "unscale_gradients", lambda: done.append("unscale"))
    monkeypatch.setattr(trainer._clipping, "clip", lambda *args: done.append("clip") or clip(*args))
    trainer.train()
    assert done == ["unscale", "clip"] * STEPS


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_gradient_that_is_not_finite_is_reported_by_step_block_and_parameter(tmp_path, value):
    trainer = Poisoned(
        gpt2(), arguments(tmp_path, logging_steps=4), train_dataset=Tokens(), clip_by_block=LIMITS
    )
    trainer.poison = value
    message = rf"the gradient of step {POISONED_STEP} was not finite\. ffn: {POISONED_NAME}$"
    with pytest.warns(UserWarning, match=message) as caught:
        trainer.train()
    # Two steps later, when it is logged, every block is NaN.
    assert math.isnan(logged(trainer)[1]["grad_norm/emb"])
    assert len([each for each in caught if "not finite" in str(each.message)]) == 1


def test_gradients_that_are_finite_are_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the gradient of step")
        trained(tmp_path)


def test_a_weight_decay_by_block_reaches_the_optimizer_over_trainers_own(tmp_path):
    given = {"emb": 0, Block.FFN: 0.3}
    trainer = BlockwiseTrainer(gpt2(), arguments(tmp_path, weight_decay=0.02), weight_decay=given)
    groups = trainer.create_optimizer().param_groups
    assert {g["block"]: g["weight_decay"] for g in groups} == {
        "norm": 0.02, "emb": 0.0, "qk": 0.02, "vo": 0.02, "ffn": 0.3, "pos": 0.02,
    }  # fmt: skip
    trainer = BlockwiseTrainer(
        gpt2(), arguments(tmp_path, weight_decay=0.02), weight_decay="constant", ratios={"emb": 4}
    )
    groups = trainer.create_optimizer().param_groups
    assert next(g["weight_decay"] for g in groups if g["block"] == "emb") == pytest.approx(0.02 / 4)


def test_the_factory_takes_a_weight_decay_by_block():
    _, kwargs = blockwise_optimizer(gpt2(), lr=LR, weight_decay={"norm": 0})
    assert [g["weight_decay"] for g in kwargs["params"]] == [0.0] + 5 * [0.1]


def test_limits_out_of_range_are_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="clip_by_block: ffn is 0; expected a number above 0"):
        BlockwiseTrainer(gpt2(), arguments(tmp_path), clip_by_block={"ffn": 0})
    with pytest.raises(ValueError, match="clip_by_block is 0.0; expected a number above 0"):
        BlockwiseTrainer(gpt2(), arguments(tmp_path), clip_by_block=0.0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("DEEPSPEED", "DEEPSPEED"), ("MEGATRON_LM", "MEGATRON_LM"), ("XLA", "XLA"), ("FSDP", "FSDP version 1")],
)
def test_engines_that_hide_gradients_are_refused(kind, name):
    message = (
        f"clip_by_block cannot see the gradients of single parameters under {name}; it works on one device"
    )
    with pytest.raises(ValueError, match=message):
        check_engine(kind, fsdp2=False)
    check_engine("FSDP", fsdp2=True)
    check_engine("MULTI_GPU", fsdp2=False)


def test_a_trainer_without_the_methods_that_are_overridden_is_refused(tmp_path, monkeypatch):
    class Old:
        _clip_grad_norm = Trainer._clip_grad_norm

    monkeypatch.setattr(clipping, "Trainer", Old)
    message = (
        "clip_by_block overrides Trainer._get_grad_norm, which this version of transformers does not have"
    )
    with pytest.raises(RuntimeError, match=message):
        BlockwiseTrainer(gpt2(), arguments(tmp_path), clip_by_block=1.0)


# Memory
# ---------------------------------------------------------------------------------------------------------------


def kept_tensors(clipping_):
    """How many tensors an object holds on to, in whatever it keeps them."""
    found, seen, todo = 0, set(), [clipping_]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found += 1
        elif isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, (list, tuple, set)):
            todo += each
        elif hasattr(each, "__dict__"):
            todo += vars(each).values()
    return found


def clipped(times, poison=None):
    """One gradient, clipped again and again without a line of the log."""
    model = gpt2()
    groups = param_groups(model, lr=LR)
    inner = clipping.TrainerClipping(1.0)
    counts = []
    for step in range(times):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if step == poison:
            model.get_parameter(POISONED_NAME).grad[0] = math.nan
        inner.clip(model, groups, step)
        counts.append(kept_tensors(inner))
    return inner, counts


def test_without_a_log_the_memory_is_bounded():
    _, counts = clipped(300)
    assert max(counts[150:]) <= max(counts[:150])


@pytest.mark.parametrize("poison", [3, 63, 64, 130, 148])
def test_the_first_gradient_that_was_not_finite_is_remembered_for_a_log_that_comes_late(poison):
    inner, _ = clipped(150, poison)
    with pytest.warns(
        UserWarning, match=rf"the gradient of step {poison + 1} was not finite\. ffn: {POISONED_NAME}"
    ):
        norms = inner.read(warn=True)
    assert all(math.isfinite(norm) for norm in norms.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner.read(warn=True)  # once


@pytest.mark.parametrize("layers", [2, 12])
def test_a_step_waits_for_nothing_and_a_line_of_the_log_once(layers):
    model = gpt2(n_layer=layers)
    groups = param_groups(model, lr=LR)
    inner = clipping.TrainerClipping(1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with counted_work(model) as work:
        for step in range(10):
            inner.clip(model, groups, step)
    assert work.waits == 0, work
    with counted_work(model) as work:
        norms = inner.read(warn=True)
    assert work.waits == 1, work
    assert set(norms) == {group["block"] for group in groups}


def test_a_gradient_that_was_not_finite_is_reported_at_the_end_where_nothing_is_logged(tmp_path):
    trainer = Poisoned(
        gpt2(), arguments(tmp_path, logging_strategy="no"), train_dataset=Tokens(), clip_by_block=LIMITS
    )
    trainer.poison = math.nan
    with pytest.warns(UserWarning, match=rf"the gradient of step {POISONED_STEP} was not finite"):
        trainer.train()
