"""Which dimension counts outputs: asked of autograd, and what Muon makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwise_lr import BlockMap, classify, param_groups, split_fused
from blockwise_lr.optimizers.muon import Muon
from support.architectures import CAUSAL, build
from support.cases import gpt2
from support.proofs import UNBUILDABLE, vary

pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = ("gpt_oss", "llama4_text", "aria_text", "mixtral", "granitemoe", "jetmoe", "nemotron_h", "qwen3_moe")


def output_dims(blocks: BlockMap) -> dict[str, int]:
    return {name: blocks.assignment(name).structure.output_dim for name in blocks}


def moved(parameter: Tensor) -> float:
    """Length of the first step of Muon on this gradient, at rate 1."""
    return float(parameter.detach().norm())


def linear_and_transposed(rows: int, columns: int) -> tuple[nn.Linear, Conv1D]:
    linear, conv = nn.Linear(columns, rows, bias=False), Conv1D(rows, columns)
    with torch.no_grad():
        linear.weight.zero_()
        conv.weight.zero_()
    return linear, conv


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 16), (16, 64), (16, 16)])
def test_conv1d_is_stepped_as_the_linear_layer_that_it_is(adjust: Any, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    linear, conv = linear_and_transposed(outputs, inputs)
    gradient = torch.randn(outputs, inputs)
    for module, grad in ((linear, gradient), (conv, gradient.T.contiguous())):
        model = nn.ModuleDict({"mlp": nn.ModuleDict({"c_fc": module})})
        groups = param_groups(model, 1.0, {}, weight_decay=0.0, blocks=classify(model, {"mlp.c_fc.*": "ffn"}))
        optimizer = Muon(groups, adjust_lr_fn=adjust, min_side=1)
        module.weight.grad = grad
        optimizer.step()
    rounding = {"rtol": 0.0, "atol": 0.02} if adjust == "match_rms_adamw" else {}  # bfloat16's, of a square
    torch.testing.assert_close(conv.weight.T, linear.weight, **rounding)
    assert moved(linear.weight) > 1


def test_every_matrix_of_gpt2_moves_by_outputs_over_inputs() -> None:
    torch.manual_seed(0)
    model = split_fused(gpt2())
    optimizer = Muon(param_groups(model, 1.0, {}, weight_decay=0.0), adjust_lr_fn="original", min_side=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(40, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    dims = output_dims(classify(model))
    seen = 0
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"]):
            if group["algorithm"] == "muon":
                outputs, inputs = p.shape[1], p.shape[0]  # Conv1D, its split parts too
                assert dims[name] == 1
                largest = torch.linalg.matrix_norm(p.detach() - before[name], 2)
                assert 0.6 < largest / max(1, outputs / inputs) ** 0.5 < 1.3, name  # Newton-Schulz: about 1
                seen += 1
    assert seen == 6  # q, k, v, o, up, down


def test_a_state_dict_from_before_keeps_the_orientation() -> None:
    model = split_fused(gpt2())
    optimizer = Muon(param_groups(model, 1e-3))
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["output_dims"]
    before = [group["output_dims"] for group in optimizer.param_groups]
    optimizer.load_state_dict(old)
    assert [group["output_dims"] for group in optimizer.param_groups] == before


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_a_transposed_stack_is_stepped_as_the_stack_of_linears(adjust: Any) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(3, 32, 8)
    stacks = []
    for grad, dim in ((gradient, 1), (gradient.mT.contiguous(), 2)):
        stack = nn.Parameter(torch.zeros_like(grad))
        group = {"params": [stack], "block": "ffn", "lr": 1.0, "output_dims": [dim]}
        stack.grad = grad
        Muon([group], adjust_lr_fn=adjust).step()
        stacks.append(stack.detach())
    torch.testing.assert_close(stacks[1].mT, stacks[0], rtol=0.0, atol=0.02)


class Experts(nn.Module):
    """Stacks that their owner stores by inputs or by outputs, and does not say which."""

    def __init__(self, by_inputs: bool, gated: bool, n: int = 3, d: int = 16, f: int = 24) -> None:
        super().__init__()
        up = (n, d, f) if by_inputs else (n, f, d)
        self.w1 = nn.Parameter(torch.randn(up))
        self.w3 = nn.Parameter(torch.randn(up)) if gated else None
        self.w2 = nn.Parameter(torch.randn((n, f, d) if by_inputs else (n, d, f)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("by_inputs", [True, False])
def test_stacks_written_by_hand_are_known_by_the_models_width(by_inputs: bool, gated: bool) -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(40, 16), "experts": Experts(by_inputs, gated)})
    blocks = classify(model, {"experts.*": "ffn"})
    dims = output_dims(blocks)
    assert {dim for name, dim in dims.items() if "experts" in name} == {2 if by_inputs else 1}


def test_a_stack_whose_sides_do_not_tell_is_taken_by_rows() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(40, 16), "experts": Experts(True, False, f=16)})
    assert output_dims(classify(model, {"experts.*": "ffn"}))["experts.w1"] == 1


def by_autograd(model: nn.Module) -> dict[str, int]:
    """The output dimension of each stack, where one token's gradient of rank 1 holds the owner's input or output."""
    owners = {
        name: (model.get_submodule(name.rpartition(".")[0]), p)
        for name, p in model.named_parameters()
        if p.ndim == 3 and p.shape[-2] != p.shape[-1] and min(p.shape[-2:]) > 1
    }
    seen: dict[nn.Module, list[Tensor]] = {}

    def watch(module: nn.Module, given: Any, made: Any) -> None:
        made = made[0] if isinstance(made, tuple) else made
        made.retain_grad()
        first = next(each for each in given if isinstance(each, Tensor) and each.is_floating_point())
        seen.setdefault(module, []).extend((first.detach().reshape(-1, first.shape[-1])[0], made))

    hooks = [module.register_forward_hook(watch) for module in {module for module, _ in owners.values()}]
    model(input_ids=torch.tensor([[5]]), use_cache=False).logits.square().sum().backward()
    for hook in hooks:
        hook.remove()
    found: dict[str, int] = {}
    for name, (module, p) in owners.items():
        if module not in seen or p.grad is None:
            continue
        expert = next((g for g in p.grad if g.any()), None)
        if expert is None:
            continue
        inputs, made = seen[module][:2]
        gradient = made.grad.reshape(-1, made.shape[-1])[0]
        left, _, right = torch.linalg.svd(expert)
        sides = {1: left[:, 0], 2: right[0]}
        for dim, vector in sides.items():
            if alike(vector, inputs):
                found[name] = 3 - dim
            elif alike(vector, gradient):
                found[name] = dim
    return found


def alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and abs(float(torch.cosine_similarity(a, b, dim=0))) > 0.999


def check(model_type: str) -> int:
    torch.manual_seed(0)
    model = vary(build(model_type))
    proved = by_autograd(model)
    dims = output_dims(classify(model))
    assert {name: dims[name] for name in proved} == proved
    return len(proved)


@pytest.mark.parametrize("model_type", QUICK)
def test_the_outputs_of_stacks_are_those_that_autograd_sees(model_type: str) -> None:
    assert check(model_type) >= 1


# They need other inputs than one token, or to be in training mode.
NOT_BY_ONE_TOKEN = ("musicgen", "musicgen_melody", "reformer", "zamba")


@pytest.mark.slow
def test_the_outputs_of_every_causal_models_stacks_are_those_that_autograd_sees() -> None:
    assert sum(check(name) > 0 for name in CAUSAL if name not in (*UNBUILDABLE, *NOT_BY_ONE_TOKEN)) >= 50
