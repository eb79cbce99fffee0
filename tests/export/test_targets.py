"""Every target gives every parameter the learning rate and weight decay of its block, by its own matching rule."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from blockwise_lr import classify, param_groups, split_fused
from blockwise_lr.export import TARGETS, export_rates
from blockwise_lr.export.axolotl import _NO_DECAY, _kinds
from blockwise_lr.export.rates import rates_of
from support.export_models import MODELS, RATIOS, expected_ratios, tiny
from support.matching_rules import RULES, axolotl, nanochat

LR = 1e-3
PROGRAMS = Path(__file__).parents[2] / "examples" / "recipes" / "export"
UNTIED = [name for name in MODELS if name != "gpt2"]


def text_for(model: nn.Module, target: str, **settings: object) -> str:
    settings = {"lr": LR, "ratios": RATIOS, "names": "model", **settings}
    return export_rates(model, target, **settings).text


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", RULES)
def test_every_parameter_gets_the_rate_of_its_block(target, name):
    model = tiny(name)
    found = RULES[target](text_for(model, target), dict(model.named_parameters()))
    assert found == {
        name: (pytest.approx(LR * ratio), pytest.approx(0.1))
        for name, ratio in expected_ratios(model).items()
    }


@pytest.mark.parametrize("target", RULES)
def test_weight_decay_can_differ_inside_a_block(target):
    model = tiny("gpt2")
    text = text_for(model, target, no_decay="1d", weight_decay=0.05)
    found = RULES[target](text, dict(model.named_parameters()))
    assert {name: decay for name, (_, decay) in found.items()} == {
        name: pytest.approx(0.0 if parameter.ndim < 2 else 0.05)
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("target", RULES)
def test_a_split_model_loses_nothing(target):
    model = split_fused(tiny("gpt2"))
    exported = export_rates(model, target, lr=LR, ratios=RATIOS)
    found = RULES[target](exported.text, dict(model.named_parameters()))
    assert found == {
        n: (pytest.approx(LR * r), pytest.approx(0.1)) for n, r in expected_ratios(model).items()
    }
    assert exported.lost == ()


@pytest.mark.parametrize(
    ("target", "name"), [("torchtitan", "gpt2"), ("automodel", "phi3"), ("json", "phi3")]
)
def test_a_fused_weight_gets_the_lower_ratio_and_the_text_says_so(target, name):
    exported = export_rates(tiny(name), target, lr=LR, ratios=RATIOS, names="model")
    (lost,) = exported.lost
    assert re.search(
        r"(c_attn|qkv_proj)\.\w+.* holds QK \(ratio 4\) and VO \(ratio 0.5\) in one parameter", lost
    )
    assert "Lost:" in exported.text or '"lost": [\n' in exported.text


@pytest.mark.parametrize("ratios", [{"qkv": 7.0, "qk": 2.0}, {"qk": 7.0, "vo": 7.0}])
def test_a_named_ratio_of_fused_weights_is_used_and_nothing_is_lost(ratios):
    exported = export_rates(tiny("phi3"), "json", ratios=ratios)
    (fused,) = [group for group in exported.groups if group.block == "qkv"]
    assert (fused.lr_ratio, exported.lost) == (7.0, ())


@pytest.mark.parametrize("target", ["automodel", "timm", "json", "optax"])
def test_a_target_with_multipliers_needs_no_learning_rate(target):
    assert "LR = " not in export_rates(tiny("llama"), target).text


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("automodel", "timm", "json", "optax")])
def test_a_target_with_absolute_rates_asks_for_one(target):
    with pytest.raises(ValueError, match="takes absolute learning rates, .* add --lr, such as --lr 6e-4"):
        export_rates(tiny("llama"), target)


def test_the_defaults_are_those_of_param_groups():
    model = tiny("llama")
    by_name = {name: g["lr_ratio"] for g in param_groups(model, LR) for name in g["names"]}
    exported = export_rates(model, "json", lr=LR)
    assert {name: group.lr_ratio for group in exported.groups for name in group.names} == by_name
    shared = inspect.signature(export_rates).parameters
    for name, parameter in inspect.signature(param_groups).parameters.items():
        if name in ("weight_decay", "no_decay", "decay", "blocks"):
            assert shared[name].default == parameter.default


def test_names_are_those_under_wrappers():
    model = tiny("llama")
    wrapped = nn.ModuleDict({"_orig_mod": model})
    assert text_for(wrapped, "automodel").splitlines()[5:] == text_for(model, "automodel").splitlines()[5:]


@pytest.mark.parametrize("unknown", ["onnx", "huggingface"])
def test_an_unknown_target_is_refused_with_the_list(unknown):
    with pytest.raises(ValueError, match=f"no target '{unknown}'; the targets are torchtitan, automodel"):
        export_rates(tiny("llama"), unknown)


def test_litgpt_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"LitGPT sets the rate of every group to one number .* set_lr"):
        export_rates(tiny("llama"), "litgpt", lr=LR)


@pytest.mark.parametrize("target", RULES)
@pytest.mark.parametrize("word", ['a"b', "a\\n", "a'b", "[a]*"])
def test_names_with_quotes_and_backslashes(target, word):
    model = nn.ModuleDict({word: nn.Embedding(8, 4), "norm": nn.LayerNorm(4)})
    blocks = classify(model, overrides={f"^{re.escape(word)}": "emb"})
    found = RULES[target](text_for(model, target, blocks=blocks), dict(model.named_parameters()))
    assert {name: rate for name, (rate, _) in found.items()} == {
        f"{word}.weight": pytest.approx(LR * RATIOS["emb"]),
        "norm.weight": pytest.approx(LR * RATIOS["norm"]),
        "norm.bias": pytest.approx(LR * RATIOS["norm"]),
    }


@pytest.mark.parametrize("target", RULES)
def test_one_block_alone_can_have_weight_decay(target):
    model = tiny("llama")
    text = text_for(model, target, weight_decay={**dict.fromkeys(RATIOS, 0.0), "emb": 0.1})
    found = RULES[target](text, dict(model.named_parameters()))
    assert {name for name, (_, decay) in found.items() if decay} == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("target", ["automodel", "megatron"])  # they divide by it
def test_no_weight_decay_at_all(target):
    model = tiny("llama")
    found = RULES[target](text_for(model, target, weight_decay=0), dict(model.named_parameters()))
    assert {decay for _, decay in found.values()} == {0}


class TestAxolotl:
    @pytest.mark.parametrize("name", MODELS)
    def test_what_it_can_express_is_right_and_the_rest_is_named(self, name):
        model = tiny(name)
        exported = export_rates(model, "axolotl", lr=LR, ratios=RATIOS)
        expected = expected_ratios(model)
        decayed = get_parameter_names(model, [nn.LayerNorm], [_NO_DECAY.pattern])
        for parameter, (lr, decay) in axolotl(exported.text, model).items():
            if "embed_tokens" in parameter or "lm_head" in parameter:
                assert (lr, decay) == (pytest.approx(LR * 12), 0)  # HEAD's, the lower
            elif parameter in decayed:
                assert (lr, decay) == (pytest.approx(LR * expected[parameter]), 0.1)
            else:
                assert (lr, decay) == (LR, 0)
        lost = " ".join(exported.lost)
        assert re.search(r"keeps norms and biases at the base rate: all of NORM .* get ratio 1, not 32", lost)
        assert ("one rate, for EMB (ratio 16) and HEAD (ratio 12)" in lost) == (name != "gpt2")
        assert all(
            sentence[:40] in " ".join(exported.text.replace("\n# ", " ").split())
            for sentence in exported.lost
        )

    @pytest.mark.parametrize("name", MODELS)
    def test_norms_and_biases_are_those_of_the_trainer(self, name):
        model = tiny(name)
        decayed = get_parameter_names(model, [nn.LayerNorm], [_NO_DECAY.pattern])
        kinds = _kinds(rates_of(model))
        fixed = {each for each, kind in kinds.items() if kind == "fixed"}
        assert fixed == set(kinds) - set(decayed)

    def test_a_module_that_peft_trains_whole_is_an_embedding(self):
        model = nn.ModuleDict({"q_proj": nn.Linear(4, 4, bias=False), "score": nn.Module()})
        model["score"].modules_to_save = nn.ModuleDict({"default": nn.Linear(4, 2)})
        blocks = classify(model, overrides={"q_proj": "qk", "score": "head"})
        exported = export_rates(model, "axolotl", lr=LR, ratios=RATIOS, blocks=blocks)
        found = axolotl(exported.text, model)
        assert found["score.modules_to_save.default.weight"] == (pytest.approx(LR * 12), 0)
        assert found["score.modules_to_save.default.bias"] == (LR, 0)
        assert found["q_proj.weight"] == (pytest.approx(LR * 4), 0.1)
        assert "modules_to_save" in " ".join(exported.lost)

    def test_weight_decay_by_block_is_named(self):
        lost = export_rates(tiny("llama"), "axolotl", lr=LR, weight_decay={"qk": 0.0}).lost
        assert "axolotl has one weight decay: QK gets 0.1, not 0" in lost


class TestNanochat:
    @pytest.mark.parametrize("name", UNTIED)
    def test_the_embedding_and_the_head_get_their_rates(self, name):
        text = export_rates(tiny(name), "nanochat", lr=LR, ratios=RATIOS).text
        found = nanochat(text, width=16)
        assert found["transformer.wte"] == pytest.approx(LR * RATIOS["emb"])
        assert found["lm_head"] == pytest.approx(LR * RATIOS["head"])

    @pytest.mark.parametrize("name", UNTIED)
    def test_what_it_cannot_express_is_named(self, name):
        lost = " ".join(export_rates(tiny(name), "nanochat", lr=LR, ratios=RATIOS).lost)
        blocks = {block.value for block in classify(tiny(name)).counts()} - {"emb", "head", "norm"}
        assert re.search("no rates for ([^:]*):", lost)[1].count(" ") == 2 * len(blocks) - 1
        assert all(re.search(rf"\b{block.upper()} \d", lost) for block in blocks)
        assert "norms have no parameters" in lost

    def test_a_tied_head_is_refused(self):
        with pytest.raises(ValueError, match="no HEAD: name a model whose head is not tied"):
            export_rates(tiny("gpt2"), "nanochat", lr=LR)


def test_groups_from_json_train_as_param_groups_do(tmp_path):
    program = runpy.run_path(str(PROGRAMS / "deepspeed_train.py"))
    models = [program["build"]() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    path = tmp_path / "blocks.json"
    path.write_text(export_rates(models[0], "json", lr=LR, ratios=RATIOS).text)
    groups = program["groups_from_json"](models[0], path)
    optimizers = [torch.optim.AdamW(groups), torch.optim.AdamW(param_groups(models[1], LR, RATIOS))]
    ids = torch.arange(8)[None]
    for model, optimizer in zip(models, optimizers):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.allclose(one, other, rtol=1e-6)
