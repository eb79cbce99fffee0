"""The cosines of AutoRatios: few kernels, one transfer to the host, hardly any memory, and the right numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from blockwise_lr import AdamMini, AutoRatios, AutoRule, Block, cosine_schedule, param_groups, split_fused
from blockwise_lr.directional import parameter_chunks
from blockwise_lr.experimental.agreement import agreement
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from support import tiny_models
from support.device_work import counted_work
from support.peak_memory import allocated

KINDS = [torch.optim.AdamW, AdamMini]


def stepped(model: nn.Module, kind: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    """An optimizer after a step, and gradients of another batch."""
    optimizer = kind(param_groups(model, lr=1e-3), lr=1e-3, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(40, (2, 9), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if not optimizer.state:
            optimizer.step()
    return optimizer


def by_block(optimizer: torch.optim.Optimizer) -> dict[Block, list[dict[str, Any]]]:
    groups: dict[Block, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(Block(group["block"]), []).append(group)
    return groups


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_do_not_grow_with_the_layers_and_the_host_waits_once(kind) -> None:
    kernels = []
    for layers in (2, 12, 48):
        model = tiny_models.llama(hidden_size=8, intermediate_size=16, num_hidden_layers=layers)
        optimizer = stepped(model, kind)
        schedule = cosine_schedule(optimizer, warmup_steps=1, total_steps=100)
        auto = AutoRatios(optimizer, schedule, AutoRule(start=0.0, measurements=25))
        measured, between = 0, 0
        for step in range(3, 6):
            schedule.last_epoch = step
            with counted_work(model) as work:
                auto._before_step(optimizer, (), {})
            if auto.due(step):
                measured += 1
                assert work.waits == 1, work.waits_of
                kernels.append(work.kernels)
            else:
                between += 1
                assert (work.kernels, work.waits) == (0, 0)
        assert (measured, between) == (1, 2)
        assert len(auto.cosines) == 6
    assert kernels[0] == kernels[1] == kernels[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_takes_at_most_1_byte_a_parameter(kind, dtype) -> None:
    shape = ModelConfig("llama", hidden_size=128, layers=8, heads=4, vocab_size=256, context=16)
    model = split_fused(build_model(shape, seed=0)).to(dtype)
    optimizer = stepped(model, kind)
    numel = sum(parameter.numel() for parameter in model.parameters())
    memory = allocated(lambda: agreement(by_block(optimizer), optimizer))
    assert 0 < memory.peak < 1.0 * numel
    assert memory.left < 1000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_cosines_do_not_depend_on_the_size_of_the_chunks(family, kind, monkeypatch) -> None:
    make = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2}[family]
    model = split_fused(make(seed=2).double())
    optimizer = stepped(model, kind)
    expected = agreement(by_block(optimizer), optimizer)
    for elements in (1, 7, 64):
        monkeypatch.setattr(parameter_chunks, "_CPU_ELEMENTS", (elements, elements))
        assert agreement(by_block(optimizer), optimizer) == pytest.approx(expected, rel=1e-12)


def test_a_bias_correction_uses_the_steps_of_its_own_parameter() -> None:
    """After many steps of all parameters but one, its cosine with its first gradient is still that of the formula."""
    model = tiny_models.llama(seed=0).double()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3), lr=1e-3, eps=1e-2)  # eps shows the correction
    late = model.model.layers[1].mlp.up_proj.weight
    for step in range(5):
        optimizer.zero_grad()
        ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        if step < 3:
            late.grad = None
        if step < 4:
            optimizer.step()
    dots = torch.zeros(3, dtype=torch.float64)
    for parameter in by_block(optimizer)[Block.FFN][0]["params"]:
        state, (beta1, beta2) = optimizer.state[parameter], optimizer.param_groups[0]["betas"]
        t = 1 if parameter is late else 4
        assert state["step"] == t
        root = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt()
        update, gradient = state["exp_avg"] / (1 - beta1**t) / (root + 1e-2), parameter.grad
        dots += torch.stack([(a * b).sum() for a, b in ((gradient, update), (gradient,) * 2, (update,) * 2)])
    expected = float(dots[0] / (dots[1] * dots[2]).sqrt())
    assert agreement(by_block(optimizer), optimizer)[Block.FFN] == pytest.approx(expected, rel=1e-12)


def test_fused_adamw_counts_its_steps_on_the_device_and_is_read_alike() -> None:
    plain, fused = (
        agreement(by_block(optimizer), optimizer)
        for optimizer in (
            stepped(tiny_models.llama(seed=0), torch.optim.AdamW),
            stepped(tiny_models.llama(seed=0), torch.optim.AdamW, fused=True),
        )
    )
    assert fused == pytest.approx(plain, abs=1e-6)
