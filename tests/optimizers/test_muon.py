"""Muon and AdamW as one optimizer: what each half gets, and that each half is torch's to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from blockwise_lr import adopt_state, param_groups, split_fused
from blockwise_lr.optimizers.muon import Muon, algorithm_of
from support.cases import gpt2, llama, mixtral

LR, DECAY = 1e-3, 0.1


def batch(i: int) -> Tensor:
    return torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(i))


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 4) -> None:
    for i in range(steps):
        ids = batch(i)
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def by_algorithm(optimizer: Muon) -> dict[str, set[str]]:
    names: dict[str, set[str]] = {"muon": set(), "adamw": set()}
    for group in optimizer.param_groups:
        names[group["algorithm"]] |= set(group["names"])
    return names


def test_both_halves_are_torchs_own_to_the_bit() -> None:
    torch.manual_seed(0)
    ours = llama()
    torchs = copy.deepcopy(ours)
    optimizer = Muon(param_groups(ours, LR, {"qk": 2.0}, weight_decay=DECAY))
    matrices = [
        p
        for n, p in torchs.named_parameters()
        if "proj" in n and n.split(".")[-2] not in ("q_proj", "k_proj")
    ]
    qk = [p for n, p in torchs.named_parameters() if n.split(".")[-2] in ("q_proj", "k_proj")]
    rest = [p for n, p in torchs.named_parameters() if "proj" not in n]
    assert len(matrices) == 5
    train(ours, optimizer)
    train(
        torchs,
        torch.optim.Muon([{"params": matrices}, {"params": qk, "lr": 2 * LR}], lr=LR, weight_decay=DECAY,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY, fused=True),
    )  # fmt: skip
    for (name, p), q in zip(ours.named_parameters(), torchs.parameters()):
        assert torch.equal(p, q), name


def test_every_expert_of_a_stack_is_a_matrix_of_its_own() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 12))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    optimizer = Muon([{"params": [stack], "block": "ffn", "lr": LR}])
    torchs = torch.optim.Muon(alone, lr=LR, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn(3, 8, 12) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
        for matrix, gradient in zip(alone, stack.grad):
            matrix.grad = gradient.clone()
        optimizer.step()
        torchs.step()
    assert all(torch.equal(a, b) for a, b in zip(stack, alone))
    assert optimizer.state[stack]["momentum_buffer"].shape == stack.shape


def test_a_mixture_of_experts_is_divided_by_matrix() -> None:
    optimizer = Muon(param_groups(mixtral(), LR))
    layer = "model.layers.0."
    assert by_algorithm(optimizer)["muon"] == {
        layer + name
        for name in ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.experts.gate_up_proj",
                     "mlp.experts.down_proj")
    }  # fmt: skip
    reasons = optimizer.reasons()
    assert reasons[layer + "mlp.experts.down_proj"] == "muon: a stack of 4 matrices of ffn"
    assert reasons[layer + "mlp.gate.weight"] == "adamw: in router, which is none of qk, vo, ffn"
    assert reasons[layer + "self_attn.k_proj.weight"].startswith("adamw: its smaller side is 4")


def test_a_split_weight_goes_part_by_part_and_its_biases_to_adamw() -> None:
    model = split_fused(gpt2())
    optimizer = Muon(param_groups(model, LR))
    names = by_algorithm(optimizer)
    assert sum("c_attn.parametrizations.weight" in name for name in names["muon"]) == 3
    assert all("bias" in name or "ln" in name or "wte" in name or "wpe" in name for name in names["adamw"])


def test_the_groups_keep_what_they_carried() -> None:
    model = split_fused(gpt2())
    before = param_groups(model, LR, {"qk": 8.0, "norm": 1.0}, no_decay="1d", decay="constant")
    optimizer = Muon(copy.copy(before))
    named = {id(p): name for name, p in model.named_parameters()}
    assert optimizer.param_groups[0]["block"] == "norm"
    assert sorted(n for g in optimizer.param_groups for n in g["names"]) == sorted(named.values())
    of = {name: group for group in before for name in group["names"]}
    for group in optimizer.param_groups:
        assert [named[id(p)] for p in group["params"]] == group["names"] != []
        for name in group["names"]:
            for key in ("block", "lr", "initial_lr", "lr_ratio", "decay", "weight_decay"):
                assert group[key] == of[name][key]
    # The ratio of a block reaches both halves of it.
    qk = {g["algorithm"]: g["lr"] for g in optimizer.param_groups if g["block"] == "qk"}
    assert qk == {"muon": 8 * LR, "adamw": 8 * LR}


@pytest.mark.parametrize("shape", [(8, 8), (16, 64), (128, 32)])
def test_the_update_has_one_size_whatever_the_shape(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([{"params": [matrix], "block": "vo", "lr": 1.0, "weight_decay": 0.0}])
    matrix.grad = torch.randn(shape) * 1e-4
    optimizer.step()
    assert 0.14 < matrix.square().mean().sqrt() < 0.24  # 0.2, and what Newton-Schulz leaves of it
    plain = nn.Parameter(torch.zeros(shape))
    group = {"params": [plain], "block": "vo", "lr": 1.0, "output_dims": [0]}
    original = Muon([group], adjust_lr_fn="original")
    plain.grad = matrix.grad
    original.step()
    ratio = 0.2 * max(shape) ** 0.5 / max(1, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(matrix, ratio * plain)


@pytest.mark.parametrize(
    ("block", "shape", "algorithm", "reason"),
    [
        ("ffn", (16, 8), "muon", "a matrix of ffn"),
        ("ffn", (4, 16, 8), "muon", "a stack of 4 matrices of ffn"),
        ("ffn", (16, 8, 1), "adamw", "its smaller side is 1: a convolution's kernel"),
        ("ffn", (16, 8, 3, 3), "adamw", "4 dimensions in ffn: a convolution"),
        ("vo", (4, 16, 8), "adamw", "3 dimensions in vo: a convolution, or matrices in a layout"),
        ("qk", (8,), "adamw", "a vector"),
        ("ffn", (1, 512), "adamw", "its smaller side is 1: .* or a matrix below 8"),
        ("conv", (16, 8, 3), "adamw", "in conv, which is none of qk, vo, ffn"),
        ("emb", (40, 8), "adamw", "in emb"),
        ("head", (40, 8), "adamw", "in head"),
        ("qkv", (24,), "adamw", "in qkv"),
    ],
)
def test_what_goes_where_and_why(block: str, shape: tuple[int, ...], algorithm: str, reason: str) -> None:
    import re

    found, why = algorithm_of(block, shape)
    assert found == algorithm
    assert re.match(reason, why)


def test_a_smaller_or_larger_side_can_be_asked_for() -> None:
    assert (
        by_algorithm(Muon(param_groups(mixtral(), LR), min_side=4))["muon"]
        > by_algorithm(Muon(param_groups(mixtral(), LR)))["muon"]
    )
    assert by_algorithm(Muon(param_groups(mixtral(), LR), min_side=100))["muon"] == set()


def test_groups_of_your_own_say_which_rule() -> None:
    a, b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
    optimizer = Muon([{"params": [a], "algorithm": "muon"}, {"params": [b], "algorithm": "adamw"}], lr=LR)
    a.grad, b.grad = torch.ones(8, 8), torch.ones(8, 8)
    optimizer.step()
    assert set(optimizer.state[a]) == {"momentum_buffer"}
    assert set(optimizer.state[b]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3))], "block": "norm"})
    assert optimizer.param_groups[-1]["algorithm"] == "adamw"


def test_a_distributed_checkpoints_state_loads_into_a_fresh_optimizer() -> None:
    torch.manual_seed(0)
    model = mixtral()
    optimizer = Muon(param_groups(model, LR))
    train(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    fresh = Muon(param_groups(model, LR))
    set_optimizer_state_dict(model, fresh, copy.deepcopy(state))
    again = get_optimizer_state_dict(model, fresh)
    assert again["param_groups"] == state["param_groups"]
    for name, values in state["state"].items():
        assert all(torch.equal(value, again["state"][name][key]) for key, value in values.items())


def test_under_torch_compile_a_step_is_that_of_the_plain_optimizer() -> None:
    torch.manual_seed(0)
    plain = llama()
    compiled = copy.deepcopy(plain)
    optimizer = Muon(param_groups(plain, LR))
    train(plain, optimizer)
    other = Muon(param_groups(compiled, LR))
    step = torch.compile(other.step, backend="eager")
    for i in range(4):
        ids = batch(i)
        compiled(input_ids=ids, labels=ids).loss.backward()
        step()
        compiled.zero_grad()
    torch._dynamo.reset()
    for group in other.param_groups:
        for parameter in group["params"]:
            if group["algorithm"] == "adamw":
                assert other.state[parameter]["step"] == 4
    assert all(map(torch.equal, plain.parameters(), compiled.parameters()))


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = llama()
    adamw = torch.optim.AdamW(param_groups(model, LR))
    train(model, adamw)
    optimizer = Muon(param_groups(model, LR))
    with pytest.raises(
        ValueError, match=r"another optimizer than Muon; .* adopt_state\(state, model, optimizer\)"
    ):
        optimizer.load_state_dict(adamw.state_dict())
    assert not optimizer.state
    adopt_state(adamw.state_dict(), model, optimizer)
    train(model, optimizer)


def test_original_scaling_refuses_outputs_that_are_not_known_and_both_remedies_work() -> None:
    model = split_fused(gpt2())  # Conv1D: outputs are columns
    groups = param_groups(model, LR)
    other = copy.deepcopy(model)
    copied = dict(other.named_parameters())
    foreign = [{**group, "params": [copied[name] for name in group["names"]]} for group in groups]
    message = (
        r'adjust_lr_fn="original" scales \S+weight of shape \(8, 32\) by its outputs over its inputs, and its group '
        r"does not say which dimension counts the outputs; expected a group of blockwise_lr\.param_groups, .*: make "
        r"the groups with param_groups\(model, lr\), or give this group `output_dims`"
    )
    with pytest.raises(ValueError, match=message):
        Muon(foreign, adjust_lr_fn="original")
    Muon(foreign)  # the default scaling is symmetric
    remade = Muon(param_groups(other, LR), adjust_lr_fn="original")
    stated = [
        {**group, "output_dims": [1 if p.ndim == 2 else 0 for p in group["params"]]} for group in groups
    ]
    given = Muon(stated, adjust_lr_fn="original")
    train(model, given)
    train(other, remade)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    square = {"params": [nn.Parameter(torch.ones(8, 8))], "block": "vo"}
    Muon([square], adjust_lr_fn="original")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Muon(param_groups(gpt2(), LR, {})),
            r"c_attn\.weight is a fused QKV weight, and Muon .* call split_fused\(model\) first",
        ),
        (lambda: Muon(llama().parameters()), r"parameters without a block: make the groups with param_groups"),
        (lambda: Muon(param_groups(llama(), LR), momentum=1.0), "momentum is 1.0; expected 0 or more and below 1"),
        (lambda: Muon(param_groups(llama(), LR), eps=-1.0), "eps is -1.0; expected 0 or more"),
        (lambda: Muon(param_groups(llama(), LR), adjust_lr_fn="rms"), "adjust_lr_fn is 'rms'; expected"),
        (lambda: Muon([{"params": [nn.Parameter(torch.ones(1))], "algorithm": "sgd"}]), "'sgd'; expected \"muon\" or"),
    ],
)  # fmt: skip
def test_what_it_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
