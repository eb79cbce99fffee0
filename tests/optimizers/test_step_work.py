"""The kernels and host waits of AdamMini's plain step do not grow with the number of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from blockwise_lr import AdamMini, param_groups
from support import tiny_models
from support.device_work import Work, counted_work

LAYERS = (2, 12, 48)
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "gpt2": lambda layers: tiny_models.gpt2(split=True, n_layer=layers),
    "llama": lambda layers: tiny_models.llama(num_hidden_layers=layers),
}


def work_of_a_step(model: nn.Module, **settings: bool) -> Work:
    optimizer = AdamMini(param_groups(model, 1e-3), **settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # creates the state
    with counted_work(model) as work:
        optimizer.step()
    return work


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_adam_mini_runs_the_same_kernels_for_any_number_of_layers(
    name: str, dtype: torch.dtype
) -> None:
    works = [work_of_a_step(MODELS[name](layers).to(dtype)) for layers in LAYERS]
    assert works[0].operators == works[1].operators == works[2].operators
    # The numbers of steps are on the CPU in any case; reading them waits for nothing.
    assert all(work.waits_of == {"tolist": 1} for work in works), works


def test_maximizing_runs_the_same_kernels_too() -> None:
    works = [work_of_a_step(MODELS["gpt2"](layers), maximize=True) for layers in LAYERS]
    assert works[0].operators == works[1].operators == works[2].operators


def test_the_numbers_of_steps_stay_on_the_cpu_and_are_equal_after_loading() -> None:
    model = MODELS["llama"](2)
    optimizer = AdamMini(param_groups(model, 1e-3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    steps = [each["step"] for each in optimizer.state.values()]
    assert all(step.device.type == "cpu" and step.dtype == torch.float32 and step == 1 for step in steps)
