"""AdamMini against the reference package where that is right, a literal loop elsewhere, and torch's contract."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from adam_mini import Adam_mini
from torch import Tensor, nn

from blockwise_lr import AdamMini, adopt_state, param_groups, split_fused
from blockwise_lr.optimizers import adam_mini_compiled
from support.architectures import build
from support.cases import gpt2, llama
from support.nano import NanoGPT

BETAS, EPS = (0.9, 0.95), 1e-8
RATIOS = {"emb": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "norm": 1.0, "head": 2.0}


def tokens(seed: int) -> Tensor:
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    ids = tokens(seed)
    out = model(ids)
    logits = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def groups_of(model: nn.Module, lr: float, **settings: Any) -> list[dict[str, Any]]:
    return param_groups(model, lr, settings.pop("ratios", {}), **settings)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-12, atol=1e-12)


# Against the package -------------------------------------------------------------------------


def package(model: nn.Module, groups: list[dict[str, Any]], heads: int, kv_heads: int) -> Adam_mini:
    """adam-mini 1.1.1 with the learning rates and decays of our groups."""
    config: Any = model.config
    reference = Adam_mini(
        model.named_parameters(), lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.1, dim=config.hidden_size,
        n_heads=heads, n_kv_heads=kv_heads, verbose=False,
    )  # fmt: skip
    of = {name: group for group in groups for name in group["names"]}
    for group in reference.param_groups:
        group["lr"], group["weight_decay"] = of[group["name"]]["lr"], of[group["name"]]["weight_decay"]
    return reference


@pytest.mark.parametrize(
    ("kv_heads", "weight_decay", "ratios"), [(4, 0.0, {}), (2, 0.1, {}), (4, 0.1, RATIOS), (2, 0.0, RATIOS)]
)
def test_equals_the_package_over_200_steps_in_float64(
    kv_heads: int, weight_decay: float, ratios: dict[str, float]
) -> None:
    torch.manual_seed(0)
    ours = llama(num_key_value_heads=kv_heads).double()
    theirs = copy.deepcopy(ours)
    groups = groups_of(ours, 1e-3, ratios=ratios, weight_decay=weight_decay)
    optimizer = AdamMini(groups, betas=BETAS, eps=EPS)
    reference = package(theirs, optimizer.param_groups, 4, kv_heads)
    train(ours, optimizer, 200)
    train(theirs, reference, 200)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert close(mine, other), name


@pytest.mark.parametrize("ratios", [{}, RATIOS], ids=["uniform", "blockwise"])
def test_equals_the_package_over_200_steps_in_float32_at_a_small_rate(ratios: dict[str, float]) -> None:
    torch.manual_seed(0)
    ours = llama()
    theirs = copy.deepcopy(ours)
    optimizer = AdamMini(groups_of(ours, 1e-4 / 10, ratios=ratios), betas=BETAS, eps=EPS)
    reference = package(theirs, optimizer.param_groups, 4, 4)
    train(ours, optimizer, 200)
    train(theirs, reference, 200)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


# Against a literal loop ----------------------------------------------------------------------

# By the parameter's name: which elements share a second moment, written out for each of these models. ("rows", 4): four
# rows that follow one another.
_GPT2 = (
    (r"c_attn\..*weight\.original[01]", ("columns", 4)),  # two heads, in Conv1D's (inputs, outputs)
    (r"(c_attn|c_proj|c_fc)\..*weight", ("columns", 1)),
    (r"wte|wpe", ("rows", 1)),
    (r"ln_.\.weight", ("whole", 0)),
    (r"bias", ("elements", 0)),
)
_DECODER = (
    (
        r"embed_tokens|lm_head|[vo]_proj|gate_proj|up_proj\.|down_proj\.|mlp\.gate|mlp\.router\.weight",
        ("rows", 1),
    ),
    (r"norm\.weight", ("whole", 0)),
    (r"layernorm\.weight", ("whole", 0)),
    (r"bias|sinks", ("elements", 0)),
)
LITERAL = {
    "gpt2": (lambda: split_fused(gpt2()), _GPT2),
    "qwen3": (lambda: build("qwen3"), ((r"[qk]_proj\.weight", ("rows", 8)), *_DECODER)),
    "mixtral": (
        lambda: in_a_loop(build("mixtral")),
        ((r"[qk]_proj\.weight", ("rows", 8)), (r"experts", ("each rows", 1)), *_DECODER),
    ),
    "gpt_oss": (
        lambda: in_a_loop(build("gpt_oss")),
        (
            (r"experts\.\w+bias", ("each rows", 1)),
            (r"experts", ("each columns", 1)),
            (r"[qk]_proj\.weight", ("rows", 8)),
            *_DECODER,
        ),
    ),
    "deepseek_v3": (
        lambda: split_fused(in_a_loop(build("deepseek_v3"))),
        (
            (r"q_a_proj", ("rows", 1)),
            (r"q_b_proj", ("rows", 12)),  # 8 without rotation and 4 with
            (r"kv_a_proj.*original0", ("rows", 1)),  # the latent
            (r"kv_a_proj.*original1", ("rows", 4)),  # the one rotated key of all heads
            (r"kv_b_proj.*original0", ("rows", 8)),
            (r"kv_b_proj.*original1", ("rows", 1)),
            (r"experts\.(gate_up|down)_proj$", ("each rows", 1)),
            *_DECODER,
        ),
    ),
}


def in_a_loop(model: nn.Module) -> nn.Module:
    """Experts one after the other: the grouped product of all has no float64."""
    model.set_experts_implementation("eager")
    return model


def pieces(shape: torch.Size, kind: str, length: int) -> Iterator[tuple[Any, ...]]:
    """The indices of each piece."""
    if kind.startswith("each"):
        for index in range(shape[0]):
            yield from ((index, *rest) for rest in pieces(shape[1:], kind.removeprefix("each "), length))
    elif kind == "whole":
        yield (slice(None),)
    elif kind == "elements":
        yield from ((i,) for i in range(shape[0]))
    else:
        columns = kind == "columns"
        for start in range(0, shape[1] if columns else shape[0], length):
            cut = slice(start, start + length)
            yield (slice(None), cut) if columns else (cut,)


class Literal:
    """Adam-mini by its equations, piece by piece."""

    def __init__(self, model: nn.Module, kinds: Any, groups: list[dict[str, Any]]) -> None:
        self.parameters = dict(model.named_parameters())
        self.kind = {n: next(k for pattern, k in kinds if re.search(pattern, n)) for n in self.parameters}
        self.group = {name: group for group in groups for name in group["names"]}
        self.first = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.second: dict[tuple[str, int], float] = {}
        self.time = 0

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.time += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            group, first = self.group[name], self.first[name]
            first.mul_(BETAS[0]).add_((1 - BETAS[0]) * parameter.grad)
            parameter -= group["lr"] * group["weight_decay"] * parameter
            for number, index in enumerate(pieces(parameter.shape, *self.kind[name])):
                mean = float(parameter.grad[index].square().mean())
                second = BETAS[1] * self.second.get((name, number), 0.0) + (1 - BETAS[1]) * mean
                self.second[name, number] = second
                root = (second / (1 - BETAS[1] ** self.time)) ** 0.5
                parameter[index] -= group["lr"] * first[index] / (1 - BETAS[0] ** self.time) / (root + EPS)


@pytest.mark.parametrize("name", LITERAL)
def test_equals_a_literal_loop_where_the_package_is_wrong(name: str) -> None:
    make, kinds = LITERAL[name]
    torch.manual_seed(0)
    ours = make().double()
    torch.manual_seed(0)
    theirs = make().double()
    theirs.load_state_dict(ours.state_dict())
    groups = groups_of(ours, 1e-3, ratios=RATIOS)
    train(ours, AdamMini(groups, betas=BETAS, eps=EPS), 5)
    train(theirs, Literal(theirs, kinds, groups), 5)
    for (parameter, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert close(mine, other), parameter


# The state -------------------------------------------------------------------------------------


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))


def test_the_state_is_half_of_adamws_and_stays_so() -> None:
    model = build_llama_of_width(128)
    ours = AdamMini(groups_of(model, 1e-4))
    whole = torch.optim.AdamW(model.parameters(), lr=1e-4)
    train(model, ours, 1)
    shapes = [tuple(v.shape) for s in ours.state.values() for v in s.values()]
    train(model, ours, 2)
    train(model, whole, 1)
    assert shapes == [tuple(v.shape) for s in ours.state.values() for v in s.values()]
    assert bytes_of(ours) <= 0.51 * bytes_of(whole)


def build_llama_of_width(width: int) -> nn.Module:
    torch.manual_seed(0)
    return llama(hidden_size=width, intermediate_size=4 * width, vocab_size=200)


def run_of(seed: int = 0, **settings: Any) -> tuple[nn.Module, AdamMini]:
    torch.manual_seed(seed)
    model = split_fused(NanoGPT())
    return model, AdamMini(groups_of(model, 1e-2, ratios=RATIOS), **settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_run_goes_on_to_the_bit_after_saving(how: str) -> None:
    model, optimizer = run_of()
    train(model, optimizer, 3)
    other, resumed = run_of(seed=1)
    other.load_state_dict(model.state_dict())
    if how == "deepcopy":
        other, resumed = copy.deepcopy((model, optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)) if how == "pickle" else state)
    train(model, optimizer, 3, first=3)
    train(other, resumed, 3, first=3)
    assert same(model, other)


def test_the_state_is_float32_under_bfloat16_and_stays_so_after_loading() -> None:
    model, optimizer = run_of()
    half = copy.deepcopy(model).bfloat16()
    optimizer = AdamMini(groups_of(half, 1e-4))
    train(half, optimizer, 2)
    state = optimizer.state_dict()
    resumed = AdamMini(groups_of(half, 1e-4))
    resumed.load_state_dict(state)
    for parameter in half.parameters():
        assert parameter.dtype == torch.bfloat16
        for name in ("exp_avg", "exp_avg_sq"):
            assert resumed.state[parameter][name].dtype == torch.float32
            assert torch.equal(resumed.state[parameter][name], optimizer.state[parameter][name])


def test_bfloat16_parameters_decay_by_less_than_they_can_hold_in_one_factor() -> None:
    """1 - lr * weight_decay rounds to 1 in bfloat16; the step is computed in float32."""
    parameter = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    optimizer = AdamMini([{"params": [parameter], "partitions": [[4]]}], lr=0.02, weight_decay=0.19)
    for _ in range(3):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert parameter[0].item() < 1


# What torch's optimizers do --------------------------------------------------------------------


def test_with_every_vector_only_it_is_adamw() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(7), torch.randn(50, 7)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mini = AdamMini([{"params": [ours], "partitions": [[7]]}], lr=1e-2, betas=BETAS)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=BETAS, weight_decay=0.1)
    for gradient in gradients:
        for parameter, optimizer in ((ours, mini), (theirs, adamw)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_maximize_is_a_step_on_the_negative_gradient() -> None:
    (up, ascending), (down, descending) = run_of(maximize=True), run_of()
    for model, sign in ((up, -1.0), (down, 1.0)):
        (sign * loss_of(model, 0)).backward()
    ascending.step()
    descending.step()
    assert same(up, down)


def test_parameters_without_a_gradient_are_left_alone_and_count_their_own_steps() -> None:
    model, optimizer = run_of()
    frozen = model.transformer.wpe.weight
    before = frozen.detach().clone()
    loss_of(model, 0).backward()
    frozen.grad = None
    optimizer.step()
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    train(model, optimizer, 1)
    assert optimizer.state[frozen]["step"] == 1
    assert optimizer.state[model.transformer.wte.weight]["step"] == 2


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    model, optimizer = run_of()
    twin, other = run_of()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    train(twin, other, 1)
    assert same(model, twin)
    assert torch.equal(loss, loss_of(run_of()[0], 0))


def test_a_group_can_be_added_later_with_a_rate_of_its_own() -> None:
    model, twin = run_of()[0], run_of()[0]
    groups = groups_of(model, 1e-2)
    optimizer = AdamMini(groups[:1])
    for group in groups[1:]:
        optimizer.add_param_group(group)
    train(model, optimizer, 2)
    train(twin, AdamMini(groups_of(twin, 1e-2)), 2)
    assert same(model, twin)


def test_a_learning_rate_may_be_a_tensor() -> None:
    (model, _), (twin, _) = run_of(), run_of()
    groups = groups_of(model, 1e-2)
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    train(model, AdamMini(groups), 2)
    train(twin, AdamMini(groups_of(twin, 1e-2)), 2)
    assert same(model, twin)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: NanoGPT(bias=False), gpt2], ids=["outputs in rows", "outputs in columns"]
)
def test_compiled_equals_plain(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_mini_compiled, "_LARGE", 10)  # below, what is not compiled would be all of it
    torch.manual_seed(0)
    model, twin = (split_fused(make()).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    plain, compiled = (AdamMini(groups_of(m, 1e-2), compile=c) for m, c in ((model, False), (twin, True)))
    train(model, plain, 5)
    train(twin, compiled, 5)
    for (name, one), other in zip(model.named_parameters(), twin.parameters()):
        if not name.endswith(
            "bias.original1"
        ):  # the true gradient of the keys' biases is zero: noise decides
            assert close(one, other)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("partition", [[6, 1], [1, 8], [3, 1], [1, 4], [2, 4], [6, 8]])
def test_the_order_in_memory_makes_no_difference(
    partition: list[int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_mini_compiled, "_LARGE", 10)
    generator = torch.Generator().manual_seed(0)
    values, gradients = (torch.randn(2, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for order in (lambda t: t.clone(), lambda t: t.T.contiguous().T):
        parameters = [nn.Parameter(order(value)) for value in values]
        optimizer = AdamMini([{"params": parameters, "partitions": [partition] * 2}], compile=compiled)
        for _ in range(3):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = order(gradient)
            optimizer.step()
        results.append(parameters)
    assert results[0][0].is_contiguous()
    assert not results[1][0].is_contiguous()
    for one, other in zip(*results):
        assert close(one, other)


# Errors ------------------------------------------------------------------------------------------


@contextmanager
def says(text: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    with pytest.raises(kind, match=re.escape(text)):
        yield


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_of_another_optimizer_is_refused(kind: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4)).to(dtype)
    other = kind(param_groups(model, lr=1e-3))
    model(torch.arange(3)).square().sum().backward()
    other.step()
    optimizer = AdamMini(param_groups(model, lr=1e-3))
    with says(
        "another optimizer than AdamMini; expected the state_dict() of AdamMini: carry the moments over"
    ):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state
    if kind is torch.optim.AdamW:
        adopt_state(other.state_dict(), model, optimizer)
        optimizer.step()


def test_bad_hyperparameters_are_refused() -> None:
    groups = groups_of(run_of()[0], 1e-2)
    for settings, text in (
        ({"lr": -1.0}, "lr is -1.0; expected 0 or above"),
        ({"eps": -1.0}, "eps is -1.0; expected 0 or above"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; expected 0 or above"),
        ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0); expected two numbers from 0 to below 1"),
        ({"differentiable": True}, "AdamMini has no differentiable step: leave out differentiable=True"),
    ):
        with says(text):
            AdamMini(groups, **settings)


def test_parameters_without_groups_are_refused() -> None:
    model = run_of()[0]
    for params in (model.parameters(), [{"params": list(model.parameters())}]):
        with says("has no `partitions`: make the groups with blockwise_lr.param_groups(model, lr)"):
            AdamMini(params)


def test_partitions_that_do_not_fit_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(6, 4))
    with says("a group has 1 parameters and 2 partitions; expected one for each"):
        AdamMini([{"params": [parameter], "partitions": [[6, 1], [6, 1]]}])
    with says("q of shape (6, 4) cannot be cut into (4, 1) equal pieces"):
        AdamMini([{"params": parameter, "partitions": [[4, 1]], "names": ["q"]}])


def test_a_fused_weight_and_unknown_heads_are_refused_by_name() -> None:
    with says("AdamMini cannot cut transformer.h.0.attn.c_attn.weight into heads: it is a fused weight"):
        AdamMini(groups_of(NanoGPT(), 1e-2))
    model = split_fused(NanoGPT())
    del model.transformer.h[0].attn.n_head
    with says(
        "or its attention does not say how many heads it has (give the module an attribute `num_heads`"
    ):
        AdamMini(groups_of(model, 1e-2))


def test_sparse_and_complex_gradients_are_refused_by_name() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = AdamMini(groups_of(table, 1e-2))
    table(torch.tensor([1])).sum().backward()
    with says("sparse gradients, and weight has one: make its embedding with sparse=False", RuntimeError):
        optimizer.step()
    parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = AdamMini([{"params": [parameter], "partitions": [[2]]}])
    parameter.grad = torch.ones_like(parameter)
    with says("complex gradients, and a parameter (2,) has one", RuntimeError):
        optimizer.step()
