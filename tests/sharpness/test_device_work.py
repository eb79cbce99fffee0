"""The kernels that a measurement starts, and the times the host waits for a GPU, do not grow with the model."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from blockwise_lr import measure_sharpness, split_fused
from blockwise_lr.sharpness import SharpnessMonitor, tensor_sums
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from support import tiny_models
from support.device_work import counted_work

LAYERS = (2, 12, 48)
MODELS = {
    "gpt2": lambda layers: tiny_models.gpt2(n_layer=layers),
    "split gpt2": lambda layers: split_fused(tiny_models.gpt2(n_layer=layers)),
    "bfloat16 gpt2": lambda layers: tiny_models.gpt2(n_layer=layers).bfloat16(),
    "llama": lambda layers: tiny_models.llama(num_hidden_layers=layers),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)

ESTIMATORS = {
    "fisher": {},
    "fisher, probes": {"probes": 2},
    "fisher, accumulated": {"accumulate": 2},
    "empirical": {"estimator": "empirical"},
    "empirical, accumulated": {"estimator": "empirical", "accumulate": 2},
}


def tokens(seed=0):
    ids = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[1, 3:] = -100
    return {"input_ids": ids, "labels": labels}


@cache
def cached(build, layers):
    """A model that a measurement leaves as it was, so all of them can share it."""
    return build(layers)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Foreach operators on the CPU too."""
    monkeypatch.setattr(tensor_sums, "_ONE_BY_ONE", frozenset())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("build", [MODELS["gpt2"], MODELS["llama"]], ids=["gpt2", "llama"])
@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_measurement_of_a_deep_model_starts_no_more_kernels_and_waits_once(build, options):
    kernels = []
    for layers in LAYERS:
        model = cached(build, layers)
        with counted_work(model) as work:
            measure_sharpness(model, [tokens(), tokens(1)], **options)
        assert work.waits == 1, work
        kernels.append(work.operators)
    assert kernels[0] == kernels[1] == kernels[2]


@each_model
def test_batches_do_not_wait_for_each_other(build):
    model = build(2)
    with counted_work(model) as work:
        measure_sharpness(model, [tokens(seed) for seed in range(5)])
    assert work.waits == 1, work


@pytest.mark.usefixtures("as_on_a_gpu")
@each_model
def test_reading_the_gradients_of_training_starts_no_more_kernels_and_waits_once(build, tmp_path):
    kernels = []
    for layers in LAYERS:
        model = build(layers)
        path = tmp_path / "sharpness.jsonl"
        monitor = SharpnessMonitor(model, every=1, estimator="empirical", tokens_per_step=9, path=path)
        model(**tokens()).loss.backward()
        with counted_work(model) as work:
            assert monitor.gradients(1) is not None
        assert work.waits == 1, work
        kernels.append(work.operators)
    assert kernels[0] == kernels[1] == kernels[2]


@pytest.mark.usefixtures("as_on_a_gpu")
@each_model
def test_reading_the_optimizer_waits_once_and_takes_the_parameters_in_a_few_groups(build):
    for layers in LAYERS:
        model = build(layers)
        adam = torch.optim.AdamW(model.parameters())
        model(**tokens()).loss.backward()
        adam.step()
        with counted_work(model) as work:
            measure_sharpness(model, estimator="optimizer", optimizer=adam, samples=9)
        assert work.waits == 1, work
        assert work.operators["_foreach_norm"] <= 40


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("layers", LAYERS)
def test_squares_are_summed_a_few_times_in_a_backward_pass(layers, monkeypatch):
    calls = []
    foreach = tensor_sums._foreach_squares
    monkeypatch.setattr(tensor_sums, "_foreach_squares", lambda each: (calls.append(1), foreach(each))[1])
    measure_sharpness(tiny_models.llama(num_hidden_layers=layers), tokens())
    assert len(calls) <= 40


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_kernel_is_for_a_single_part_of_a_fused_weight():
    model = tiny_models.gpt2(n_layer=12)
    parts = ParameterParts(model, None, distributed=False)
    gradients = [torch.randn_like(parameter) for parameter in parts.parameters]
    with counted_work(model) as work:
        found = parts.sums(gradients)
    # Dense tensors together, and the weights' columns of q, k and v, all of one shape, together.
    assert work.operators["_foreach_norm"] == 2
    for part, total in zip(parts.parts, found):
        if part.name.endswith("h.3.attn.c_attn.weight:k"):
            weight = gradients[parts.names.index(part.name.removesuffix(":k"))]
            assert float(total) == pytest.approx(float(weight[:, 8:16].double().square().sum()), rel=1e-12)
