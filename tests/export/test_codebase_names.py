"""Patterns for the parameter names of the trainers' own model code, checked against names written out by hand.

test_real_trainers.py compares those names with the trainers' own models or key maps, where they are installed.
"""

from __future__ import annotations

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from blockwise_lr.export import export_rates
from support.codebase_names import NAMES
from support.export_models import RATIOS, tiny
from support.matching_rules import RULES

LR = 1e-3
FUSED = 0.5  # the lower of QK's and VO's


@pytest.mark.parametrize(("target", "name"), NAMES, ids=" ".join)
def test_the_trainers_own_parameters_get_the_rates_of_their_blocks(target, name):
    exported = export_rates(tiny(name), target, lr=LR, ratios=RATIOS)
    found = RULES[target](exported.text, NAMES[target, name])
    ratios = RATIOS | {"qkv": FUSED}
    assert {each: lr for each, (lr, _) in found.items()} == {
        each: pytest.approx(LR * ratios[block]) for each, block in NAMES[target, name].items()
    }
    assert "Transformer's own" not in exported.naming
    assert bool(exported.lost) == (target == "megatron")
    assert ("needs fuse_qkv=False" in exported.text) == (target == "torchtitan")


def test_a_ratio_for_weights_that_the_trainer_fuses():
    exported = export_rates(tiny("llama"), "megatron", lr=LR, ratios={**RATIOS, "qkv": 2.0})
    found = RULES["megatron"](exported.text, NAMES["megatron", "llama"])
    assert found["decoder.layers.1.self_attention.linear_qkv.weight"][0] == pytest.approx(2 * LR)
    assert exported.lost == ()


@pytest.mark.parametrize(
    ("target", "prefix"), [("megatron", "module."), ("megatron", "module.module."), ("fairseq2", "module.")]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_trainers_wrapped_model_has_the_same_rates(target, prefix, name):
    exported = export_rates(tiny(name), target, lr=LR, ratios=RATIOS)
    names = NAMES.get((target, name)) or dict(tiny(name).named_parameters())
    bare = RULES[target](exported.text, names)
    wrapped = RULES[target](exported.text, [prefix + each for each in names])
    assert wrapped == {prefix + each: rate for each, rate in bare.items()}


def test_megatrons_copy_of_a_tied_embedding_has_the_embeddings_rate():
    """The last stage of a pipeline holds it under a name of its own."""
    found = RULES["megatron"](
        export_rates(tiny("gpt2"), "megatron", lr=LR, ratios=RATIOS).text,
        ["embedding.word_embeddings.weight", "output_layer.weight", "module.module.output_layer.weight"],
    )
    assert [lr for lr, _ in found.values()] == pytest.approx([LR * RATIOS["emb"]] * 3)


@pytest.mark.parametrize(
    ("name", "frozen"), [("gpt2", "transformer.wte.weight"), ("llama", "lm_head.weight")]
)
def test_a_frozen_embedding_or_head_has_no_rate(name, frozen):
    model = tiny(name)
    model.get_parameter(frozen).requires_grad_(False)
    text = export_rates(model, "megatron", lr=LR, ratios=RATIOS).text
    assert "output_layer" not in text
    assert "word_embeddings" in text or name == "gpt2"


QKV = "decoder.layers.1.self_attention.linear_qkv."


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({"ratios": {"qk": 8, "vo": 2, "qkv": 4}, "decay": "constant"}, 0.1 / 4),
        ({"ratios": {"qk": 8, "vo": 2}, "decay": "constant"}, 0.1 / 2),
        ({"ratios": {"qk": 8, "vo": 2}}, 0.1),
        ({"weight_decay": {"qkv": 0.05, "qk": 0.0}}, 0.05),
        ({"weight_decay": {"qkv": 0.04, "qk": 0.0}, "ratios": {"qkv": 4}, "decay": "constant"}, 0.01),
        ({"weight_decay": {"vo": 0.02, "qk": 0.02}}, 0.02),
        ({"no_decay": ["qkv", "qk", "vo"]}, 0.0),
    ],
)
def test_the_weight_decay_of_what_megatron_fuses(options, decay):
    exported = export_rates(tiny("llama"), "megatron", lr=LR, **options)
    found = RULES["megatron"](exported.text, NAMES["megatron", "llama"])
    assert found[f"{QKV}weight"][1] == pytest.approx(decay)
    assert not any("weight decay" in note for note in exported.lost)


def test_a_weight_decay_that_megatrons_fused_weight_loses_is_named():
    exported = export_rates(tiny("llama"), "megatron", lr=LR, weight_decay={"vo": 0.0})
    (note,) = [each for each in exported.lost if "weight decay" in each]
    assert note == (
        "decoder.layers.*.self_attention.linear_qkv.weight holds VO (weight decay 0) and QK (weight decay 0.1) in one "
        'parameter, which can have only one: it gets 0; choose another with the weight decay of "qkv"'
    )
    chosen = export_rates(tiny("llama"), "megatron", lr=LR, weight_decay={"vo": 0.0, "qkv": 0.1})
    assert not any("weight decay" in note for note in chosen.lost)


@pytest.mark.parametrize("decays", [{"qk": 0.2, "vo": 0.0}, {"qk": 0.0, "vo": 0.2}])
def test_of_equal_ratios_the_lower_weight_decay_is_exported(decays):
    """Nothing else decides, such as the order of a set, which differs between processes."""
    exported = export_rates(tiny("llama"), "megatron", lr=LR, ratios="uniform", weight_decay=decays)
    found = RULES["megatron"](exported.text, NAMES["megatron", "llama"])
    assert found[f"{QKV}weight"] == (LR, 0)
    assert "it gets 0; choose another" in exported.lost[0]


def test_fused_weights_and_biases_of_different_weight_decay():
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
        )
    )
    exported = export_rates(qwen, "megatron", lr=LR, no_decay="1d")
    found = RULES["megatron"](exported.text, [f"{QKV}weight", f"{QKV}bias"])
    assert found == {
        f"{QKV}weight": (pytest.approx(0.7 * LR), 0.1),
        f"{QKV}bias": (pytest.approx(0.7 * LR), 0),
    }


@pytest.mark.parametrize(
    ("target", "name"), [("torchtitan", "mixtral"), ("olmo-core", "gpt2"), ("timm", "llama")]
)
def test_a_model_that_the_trainer_lacks_keeps_its_names(target, name):
    model = tiny(name)
    exported = export_rates(model, target, lr=LR)
    assert exported.naming == f"{type(model).__name__}'s own"
    assert f"Parameter names: {exported.naming}." in exported.text


def test_names_of_the_model_on_request():
    model = tiny("llama")
    exported = export_rates(model, "torchtitan", lr=LR, names="model")
    assert RULES["torchtitan"](exported.text, dict(model.named_parameters()))
    with pytest.raises(ValueError, match='names is \'mine\'; expected "auto" or "model"'):
        export_rates(model, "torchtitan", lr=LR, names="mine")
