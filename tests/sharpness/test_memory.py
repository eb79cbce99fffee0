"""What a measurement adds to the memory of a training step: next to nothing."""

from __future__ import annotations

import pytest
import torch

from blockwise_lr import measure_sharpness
from blockwise_lr.sharpness.estimators import ESTIMATORS
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.training_gradients import squared_gradients
from support import tiny_models
from support.live_memory import LiveMemory

MODELS = {
    "gpt2": lambda **settings: tiny_models.gpt2(n_embd=64, n_layer=12, n_positions=128, **settings),
    "llama": lambda **settings: tiny_models.llama(
        hidden_size=64, intermediate_size=176, num_hidden_layers=12, max_position_embeddings=128, **settings
    ),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def tokens(length, rows=1, seed=0):
    ids = torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def bytes_per_parameter(model, work):
    with LiveMemory(model) as memory:
        work()
    return memory.peak / sum(p.numel() for p in model.parameters())


def test_the_counter_sees_what_is_alive():
    layer = torch.nn.Linear(1000, 1000, bias=False)
    with LiveMemory(layer) as memory:
        twice = layer.weight.detach() * 2
        assert memory.peak == 4_000_000
        del twice
        layer.weight.detach() * 2
        layer.weight.detach().view(-1)
        assert memory.peak == 4_000_000
        layer(torch.zeros(1, 1000)).sum().backward()
    assert 4_000_000 < memory.peak < 4_100_000


@each_model
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"probes": 2}, marks=pytest.mark.slow), {"estimator": "empirical"}], ids=str
)
def test_a_measurement_needs_less_than_a_byte_for_each_parameter(build, options):
    model = build().train()
    model(**tokens(4)).loss.backward()  # the gradients of a training step, which are kept
    batches = [tokens(3, seed=seed) for seed in range(3)]
    assert bytes_per_parameter(model, lambda: measure_sharpness(model, batches, **options)) < 1


@pytest.mark.slow
@each_model
def test_micro_batches_need_one_gradient_more(build):
    model = build().train()
    batches = [tokens(3, seed=seed) for seed in range(6)]

    def work():
        measure_sharpness(model, batches, estimator="empirical", accumulate=3)

    assert bytes_per_parameter(model, work) < 4 + 1.2


@each_model
def test_reading_the_gradients_or_the_optimizer_of_training_needs_less_than_a_byte(build):
    model = build()
    adam = torch.optim.AdamW(model.parameters())
    model(**tokens(4)).loss.backward()
    adam.step()
    parts = ParameterParts(model, None, distributed=False)
    assert bytes_per_parameter(model, lambda: squared_gradients(parts)) < 1
    assert bytes_per_parameter(model, lambda: ESTIMATORS["optimizer"](parts, adam, 3)) < 1


@each_model
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"estimator": "empirical"}, marks=pytest.mark.slow)], ids=str
)
def test_activations_need_no_more_than_in_the_training_step(build, checkpointing, options):
    model, batch = build().train(), tokens(128, rows=8)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    training = bytes_per_parameter(model, lambda: model(**batch).loss.backward())
    model.zero_grad()
    measurement = bytes_per_parameter(model, lambda: measure_sharpness(model, batch, **options))
    assert measurement <= 1.001 * training  # a few numbers for each token
    if checkpointing:
        model.gradient_checkpointing_disable()
        assert training < 0.5 * bytes_per_parameter(model, lambda: model(**batch).loss.backward())
