"""The kernels and host waits of clipping and of non-finite checks do not grow with the number of layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from blockwise_lr import clip_grad_norm_by_block, param_groups
from blockwise_lr.optim import nonfinite_gradients
from blockwise_lr.optim.gradients import gradient_norms, parameters_with_gradients
from blockwise_lr.train.nonfinite_guard import find_nonfinite
from support import tiny_models
from support.device_work import Work, counted_work

LAYERS = (2, 12, 48)
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "gpt2": lambda layers: tiny_models.gpt2(split=True, n_layer=layers),
    "llama": lambda layers: tiny_models.llama(num_hidden_layers=layers),
}


def norms_of(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
    return gradient_norms(parameters_with_gradients(model, groups))


# Each use with its host waits, which it has because it returns something to the host.
USES: dict[str, tuple[Callable[[nn.Module, list[dict[str, Any]]], object], int]] = {
    "clip": (lambda model, groups: clip_grad_norm_by_block(model, 0.5, blocks=groups), 0),
    "clip without groups": (lambda model, groups: clip_grad_norm_by_block(model, {"ffn": 0.5, "qk": 1.0}), 0),
    "clip by the largest element": (
        lambda model, groups: clip_grad_norm_by_block(model, 0.5, blocks=groups, norm_type=math.inf),
        0,
    ),
    "clip or raise": (
        lambda model, groups: clip_grad_norm_by_block(model, 0.5, blocks=groups, error_if_nonfinite=True),
        1,
    ),
    "gradient norms": (norms_of, 0),
    "non-finite norms": (lambda model, groups: norms_of(model, groups).nonfinite(), 1),
    "non-finite gradients": (nonfinite_gradients, 1),
}


def with_gradients(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[dict[str, Any]]]:
    for p in model.to(dtype).parameters():
        p.grad = torch.ones_like(p)
    return model, param_groups(model, 1e-3)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_do_not_grow_with_layers_and_nothing_waits_without_being_asked(
    use: str, name: str, dtype: torch.dtype
) -> None:
    run, waits = USES[use]
    works: list[Work] = []
    for layers in LAYERS:
        model, groups = with_gradients(MODELS[name](layers), dtype)
        run(model, groups)  # classifies the model
        with counted_work(model) as work:
            run(model, groups)
        works.append(work)
    assert works[0].operators == works[1].operators == works[2].operators
    assert [work.waits for work in works] == [waits] * 3, works


def test_the_report_of_a_gradient_that_is_not_finite_costs_the_same_for_any_number_of_layers() -> None:
    works: list[Work] = []
    for layers in LAYERS:
        model, groups = with_gradients(MODELS["gpt2"](layers), torch.float32)
        model.get_parameter("transformer.h.1.mlp.c_fc.weight").grad[0, :3] = math.nan
        with counted_work(model) as work:
            text, hopeless = find_nonfinite(model, groups)
        assert text == (
            "gradients that are not finite: ffn: transformer.h.1.mlp.c_fc.weight (3 nan, 0 inf of 256)"
        )
        assert not hopeless
        works.append(work)
    assert works[0].operators == works[1].operators == works[2].operators
    assert len({work.waits for work in works}) == 1


def test_the_largest_element_is_nan_if_there_is_one_and_zero_of_an_empty_gradient() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "ln_f": nn.LayerNorm(4)})
    model["ln_f"].bias.grad = torch.tensor([1.0, -3.0, math.nan, math.inf])
    model["ln_f"].weight.grad = torch.full((4,), -math.inf)
    model["wte"].weight = nn.Parameter(torch.zeros(0, 4))
    model["wte"].weight.grad = torch.zeros(0, 4)
    found = parameters_with_gradients(model, None)
    norms = {k: v for of in gradient_norms(found, math.inf).by_parameter.values() for k, v in of.items()}
    assert norms["ln_f.bias"].isnan()
    assert norms["ln_f.weight"] == math.inf
    assert norms["wte.weight"] == 0
