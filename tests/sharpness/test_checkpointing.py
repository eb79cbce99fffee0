"""Gradient checkpointing stays on while a model is measured, and changes nothing but the memory."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blockwise_lr import measure_sharpness
from sharpness.references import gpt2, llama, means, tokens
from sharpness.test_measure import assert_same_state, each_estimator, state_of

MODELS = {
    "gpt2": lambda: gpt2(n_layer=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "llama": lambda: llama(num_hidden_layers=2, attention_dropout=0.5),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def counted_forward_passes(model):
    """A list that gets an entry for each forward pass of the first layer's MLP, with its mode."""
    calls = []
    mlp = layers_of(model)[0].mlp
    # A layer that is run again may end within the MLP, at the last value that is needed.
    mlp.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    return calls


@each_estimator
@each_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_sharpness_is_the_same_and_the_model_is_left_as_it_was(options, build, reentrant):
    batches = [tokens(), tokens(seed=1)]
    expected = measure_sharpness(build().train(), batches, **options)
    model = build().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**tokens(seed=5)).loss.backward()
    before = state_of(model)
    functions = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    attributes = [set(module.__dict__) for module in model.modules()]
    assert means(measure_sharpness(model, batches, **options)) == means(expected)
    assert_same_state(before, state_of(model))
    assert all(layer._gradient_checkpointing_func is f for layer, f in zip(layers_of(model), functions))
    assert all(layer.gradient_checkpointing for layer in layers_of(model))
    assert [set(module.__dict__) for module in model.modules()] == attributes


@each_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_run_again_in_the_backward_pass_without_dropout(build, reentrant):
    model = build().train()
    calls = counted_forward_passes(model)
    measure_sharpness(model, tokens())
    assert calls == [False]
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    measure_sharpness(model, tokens(), probes=2)
    assert calls == [False] * 3


@each_model
def test_a_model_that_is_evaluated_is_checkpointed_too(build):
    model = build().eval()
    model.gradient_checkpointing_enable()
    calls = counted_forward_passes(model)
    measure_sharpness(model, tokens())
    assert len(calls) == 2
    assert not any(module.training for module in model.modules())


@each_model
def test_everything_is_restored_after_an_error(build):
    model = build().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    functions = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    before = state_of(model)

    def broken(*args):
        raise KeyboardInterrupt

    handle = layers_of(model)[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        measure_sharpness(model, tokens())
    handle.remove()
    assert_same_state(before, state_of(model))
    assert all(layer._gradient_checkpointing_func is f for layer, f in zip(layers_of(model), functions))


@each_model
def test_a_checkpointing_function_of_the_users_own_is_called(build):
    model, called = build().train(), []

    def own(function, *args, use_reentrant):
        called.append(use_reentrant)
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    model.gradient_checkpointing_enable()
    for layer in layers_of(model):
        layer._gradient_checkpointing_func = partial(own, use_reentrant=True)
    expected = means(measure_sharpness(build(), tokens()))
    assert means(measure_sharpness(model, tokens())) == expected
    assert called == [False, False]


def test_only_some_layers_may_be_checkpointed():
    model = gpt2(n_layer=2).train()
    model.gradient_checkpointing_enable()
    model.transformer.h[1].gradient_checkpointing = False
    calls = counted_forward_passes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure_sharpness(model, tokens())
    assert means(found) == means(measure_sharpness(gpt2(n_layer=2), tokens()))
    assert calls == [False] * 2
    assert torch.is_grad_enabled()
