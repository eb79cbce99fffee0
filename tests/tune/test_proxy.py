"""A proxy is a smaller model of the same family that can be built."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import count_parameters
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.presets import PRESETS
from blockwise_lr.tune.proxy import TARGET, describe_size, proxy_model


def test_the_quickstart_is_its_own_proxy():
    model = PRESETS["quickstart"].model
    assert proxy_model(model) is model


@pytest.mark.parametrize("name", ["gpt2-small", "llama-0.25b", "tinyllama-1.1b", "llama-134m-c4"])
def test_the_default_proxy_of_a_preset_is_as_small_as_its_vocabulary_allows(name):
    model = PRESETS[name].model
    small = proxy_model(model)
    assert (small.family, small.tied, small.vocab_size) == (model.family, model.tied, model.vocab_size)
    least = count_parameters(proxy_model(model, f"64x{min(4, model.layers)}"))
    assert count_parameters(small) <= max(1.5 * TARGET, least)


def test_grouped_heads_and_a_feed_forward_width_keep_their_proportions():
    small = proxy_model(PRESETS["tinyllama-1.1b"].model, "256x4")
    assert (small.heads, small.kv_heads, small.ffn_size) == (4, 1, 704)


@given(
    st.integers(1, 12),
    st.sampled_from([32, 64, 96]),
    st.integers(1, 24).map(lambda half: 2 * half),
    st.integers(1, 3),
    st.sampled_from(["llama", "gpt2"]),
)
@settings(max_examples=25, deadline=None)
def test_every_even_width_gives_a_model_that_can_be_built(heads, head, width, layers, family):
    model = ModelConfig(family, heads * head, 6, heads, vocab_size=50, context=8)
    small = proxy_model(model, f"{min(width, model.hidden_size)}x{layers}")
    assert describe_size(small) == f"{min(width, model.hidden_size)}x{layers}"
    assert count_parameters(small) <= count_parameters(model)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("small", "--proxy is 'small'; expected WIDTHxLAYERS such as 128x4, auto, or none"),
        ("256x4", "--proxy is 256x4; expected a model of at most the size that it stands for, 128x4"),
        ("0x4", "expected a model of at most"),
        ("33x2", "--proxy has width 33; expected an even one"),
    ],
)
def test_a_size_that_cannot_be_is_refused(size, message):
    with pytest.raises(UserError, match=message):
        proxy_model(ModelConfig(), size)
