"""Patterns for the parameter names of the trainers' own model code, checked against names written out by hand.

test_real_trainers.py compares those names with the trainers' own models or key maps, where they are installed.
"""

from __future__ import annotations

import pytest

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
