"""The bytes that steps of AdamMini and Muon need beyond weights, gradients and state; chunks change no result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from blockwise_lr import AdamMini, param_groups
from blockwise_lr.optimizers import adam_mini_kernel
from blockwise_lr.optimizers.muon import Muon
from support import tiny_models

DTYPES = [torch.float32, torch.bfloat16]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: tiny_models.gpt2(split=True, n_embd=64, n_layer=4, n_head=4, vocab_size=800),
    "llama": lambda: tiny_models.llama(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, vocab_size=800
    ),
}


def with_gradients(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at once beyond those before, temporaries inside operators included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def extra_bytes_a_parameter(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    with_gradients(model)
    optimizer.step()  # creates the state
    return peak_bytes(optimizer.step) / sum(p.numel() for p in model.parameters())


def test_the_allocator_is_read() -> None:
    kept = []

    def run() -> None:
        kept.append(torch.ones(1000))
        torch.ones(5000).add(1)
        torch.ones(3000)

    assert peak_bytes(run) in range(44_000, 44_000 + 1000)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alone", [0, 2**14])
def test_adam_mini_needs_half_a_byte_a_parameter_in_chunks_of_a_thirty_second_of_the_model(
    name: str, dtype: torch.dtype, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]().to(dtype)
    count = sum(p.numel() for p in model.parameters())
    monkeypatch.setitem(adam_mini_kernel._CHUNK, "cpu", count // 32)
    monkeypatch.setitem(adam_mini_kernel._ALONE, "cpu", alone)
    assert extra_bytes_a_parameter(AdamMini(param_groups(model, 1e-3)), model) < 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_mini_needs_eight_bytes_for_each_element_of_a_chunk(dtype: torch.dtype) -> None:
    model = with_gradients(nn.Linear(1024, 2048, bias=False).to(dtype))
    assert model.weight.numel() == 2 * adam_mini_kernel._CHUNK["cpu"]
    optimizer = AdamMini([{"params": [model.weight], "partitions": [[2048, 1]]}])
    optimizer.step()
    assert peak_bytes(optimizer.step) < 8.1 * adam_mini_kernel._CHUNK["cpu"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_muon_needs_what_newton_schulz_needs_for_the_largest_matrix(dtype: torch.dtype) -> None:
    """The update in the gradient's dtype, and the matrices of the iteration in bfloat16.

    A CPU that has no instructions for bfloat16 may multiply in a float32 copy, which the product allocates.
    """
    model = MODELS["llama"]().to(dtype)
    optimizer = Muon(param_groups(model, 1e-3))
    largest = max(
        (p for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]), key=torch.numel
    )
    x = largest.detach().bfloat16().reshape(min(largest.shape), -1)
    product = peak_bytes(lambda: torch.mm(x @ x.T, x)) - (x.numel() + x.shape[0] ** 2) * x.itemsize
    extra = extra_bytes_a_parameter(optimizer, model) * sum(p.numel() for p in model.parameters())
    assert extra < (dtype.itemsize + 4 * 2) * largest.numel() + product


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maximize", [False, True])
def test_chunks_and_buffers_change_nothing_but_the_order_of_a_columns_sum(
    name: str, dtype: torch.dtype, maximize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all parameters at once, each with operations of its own."""
    found: list[list[Tensor]] = []
    for chunk, alone in ((2**40, 0), (2**40, 2**40), (5000, 0), (5000, 2**40), (700, 300)):
        monkeypatch.setitem(adam_mini_kernel._CHUNK, "cpu", chunk)
        monkeypatch.setitem(adam_mini_kernel._ALONE, "cpu", alone)
        model = MODELS[name]().to(dtype)
        optimizer = AdamMini(param_groups(model, 1e-2, {"qk": 2.0}), maximize=maximize)
        for step in range(3):
            with_gradients(model, step)
            optimizer.step()
        second = [optimizer.state[p]["exp_avg_sq"] for p in model.parameters()]
        found.append([*model.parameters(), *second])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            if name == "llama":  # outputs are rows
                assert torch.equal(one, two)
            else:
                eps = torch.finfo(one.dtype).eps
                torch.testing.assert_close(one, two, rtol=max(2e-6, eps), atol=max(1e-8, 1e-2 * eps))
