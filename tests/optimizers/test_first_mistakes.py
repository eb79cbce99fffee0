"""What people write at their first try either works or is answered by what to write instead."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from blockwise_lr import (
    MEASURED_RATIOS,
    PAPER_RATIOS,
    AutoRule,
    Block,
    build_optimizer,
    classify,
    clip_grad_norm_by_block,
    measure_sharpness,
    merge_fused,
    param_groups,
    split_fused,
)
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from blockwise_lr.optim.ratios import NAMED_RATIOS, given_ratios, resolve_ratios, spell_ratios
from support import tiny_models

llama = partial(tiny_models.llama, vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1)


def by_block(groups) -> dict[str, float]:
    return {group["block"]: group["lr"] for group in groups}


@pytest.mark.parametrize("name", sorted(NAMED_RATIOS))
def test_ratios_by_name_are_those_of_the_mapping(name):
    mapping, model = dict(NAMED_RATIOS[name]), llama()
    expected = by_block(param_groups(model, 1e-3, mapping))
    assert by_block(param_groups(model, 1e-3, name)) == expected
    assert by_block(param_groups(model, 1e-3, ratios=name, weight_decay={"norm": 0})) == expected
    assert by_block(build_optimizer("adamw", model, 1e-3, name).param_groups) == expected
    assert resolve_ratios(name) == resolve_ratios(mapping)
    assert spell_ratios(name) == spell_ratios(mapping)
    _, kwargs = blockwise_optimizer(model, lr=1e-3, ratios=name)
    if "params" in kwargs:
        assert by_block(kwargs["params"]) == expected


@pytest.mark.parametrize("name", ["measured", "uniform", "auto"])
def test_the_trainer_takes_names_too(name, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    trainer = BlockwiseTrainer(llama(), arguments, ratios=name)
    lrs = by_block(trainer.create_optimizer().param_groups)
    assert lrs["vo"] / lrs["ffn"] == pytest.approx(1.0 if name == "uniform" else MEASURED_RATIOS[Block.VO])
    trainer.create_scheduler(10)
    assert (trainer.auto is not None) == (name == "auto")


def test_a_fused_weight_under_a_name_is_refused_as_under_its_mapping():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="call split_fused"):
        param_groups(attention, 1e-3, "paper")
    assert param_groups(attention, 1e-3, "uniform")


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ("papper", ["'papper'", '"uniform", "half", "paper", "measured"', 'such as {"emb": 4']),
        ("", ["''", '"half"']),
        ("emb=4,vo=0.5", ["expected a mapping here", '{"emb": 4, "vo": 0.5}']),
        (
            "sharpness.json",
            ["the name of a file", "SharpnessReport.from_json('sharpness.json')", "json.load"],
        ),
        ("auto", ["BlockwiseTrainer", "AutoRatios(optimizer, schedule, AutoRule())"]),
        (None, ["ratios is None", '"half"']),
        (10, ["ratios is 10", '{"emb": 4']),
        ([1, 4, 6], ["ratios is a list", '{"emb": 4']),
    ],
)
@pytest.mark.parametrize("take", [resolve_ratios, lambda r: param_groups(llama(), 1e-3, r)])
def test_other_texts_for_ratios_say_what_to_write(take, ratios, says):
    with pytest.raises((ValueError, TypeError)) as error:
        take(ratios)
    for words in says:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_named_way_to_read_a_file_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps({"emb": 3}))
    with pytest.raises(ValueError, match=r"json\.load\(open\('r\.json'\)\)"):
        param_groups(llama(), 1e-3, "r.json")
    with pytest.raises(TypeError, match="read it first"):
        param_groups(llama(), 1e-3, tmp_path / "r.json")
    assert by_block(param_groups(llama(), 1e-3, json.load(open("r.json"))))["emb"] == 3e-3  # noqa: PTH123, SIM115


def test_a_mapping_stays_what_it_is_and_a_rule_is_what_it_begins_with():
    assert given_ratios(PAPER_RATIOS) is PAPER_RATIOS
    assert given_ratios(AutoRule()) is MEASURED_RATIOS


class Holder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


NOT_MODELS = {
    "parameters": (lambda m: m.parameters(), "got parameters", "does not know in which block it is"),
    "named_parameters": (lambda m: m.named_parameters(), "got parameters", "(model, ...)"),
    "a list of parameters": (lambda m: list(m.parameters()), "got parameters", "(model, ...)"),
    "an optimizer": (
        lambda m: torch.optim.SGD(m.parameters()),
        "got an optimizer (SGD)",
        "AdamW(param_groups(model, lr=...), lr=...)",
    ),
    "groups": (lambda m: [{"params": m.parameters()}], "got parameter groups", "which makes the groups"),
    "a state_dict": (lambda m: m.state_dict(), "got a state_dict", "model.load_state_dict"),
    "None": (lambda m: None, "got None", "with the model that you train"),
    "a class": (lambda m: nn.Linear, "got the class Linear", "model = Linear(...)"),
    "a name": (lambda m: "gpt2", "got the text 'gpt2'", "from_pretrained"),
    "a learning rate": (lambda m: 1e-3, "got the number 0.001", "the model comes first"),
    "a trainer": (Holder, "got a Holder", "x.model"),
    "a tensor": (lambda m: torch.ones(2), "got a tensor", "(model, ...)"),
}
TAKE_A_MODEL = {
    "param_groups": lambda given: param_groups(given, 1e-3),
    "build_optimizer": lambda given: build_optimizer("adamw", given, 1e-3),
    "classify": classify,
    "split_fused": split_fused,
    "merge_fused": merge_fused,
    "clip_grad_norm_by_block": lambda given: clip_grad_norm_by_block(given, 1.0),
    "measure_sharpness": lambda given: measure_sharpness(given, []),
}


@pytest.mark.parametrize("what", NOT_MODELS)
@pytest.mark.parametrize("function", TAKE_A_MODEL)
def test_what_is_no_model_is_named_with_what_to_pass(function, what):
    make, named, remedy = NOT_MODELS[what]
    with pytest.raises(TypeError) as error:
        TAKE_A_MODEL[function](make(llama()))
    assert str(error.value).startswith(function)
    assert named in str(error.value)
    assert remedy in str(error.value)


def test_a_wrapped_model_gives_the_same_groups():
    model = llama()
    wrapped = by_block(param_groups(nn.DataParallel(model), 1e-3))
    assert wrapped == by_block(param_groups(model, 1e-3))
    assert by_block(param_groups(torch.compile(model), 1e-3)) == wrapped


@pytest.mark.parametrize(
    ("lr", "says"),
    [
        ("1e-3", "lr is the text '1e-3'; expected a number: without quotes, lr=1e-3"),
        ("fast", "lr is the text 'fast'; expected a number: lr=1e-3"),
        (None, "lr is None; expected a number: lr=1e-3"),
        (True, "lr is True; expected a number"),
        (torch.tensor(1e-3), "lr is a tensor of shape (); expected a number: lr=tensor.item()"),
        ({"emb": 1e-2}, "one number, lr=1e-3; ratios= scales it by block"),
        ([1e-3], "lr is [0.001]; expected a number"),
    ],
)
def test_a_learning_rate_that_is_no_number_says_what_to_write(lr, says):
    for take in (
        lambda: param_groups(llama(), lr),
        lambda: build_optimizer("adamw", llama(), lr),
        lambda: blockwise_optimizer(llama(), lr=lr),
    ):
        with pytest.raises(TypeError) as error:
            take()
        assert says in str(error.value)


@pytest.mark.parametrize("lr", [1, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_numbers_of_any_kind_are_learning_rates(lr):
    assert by_block(param_groups(llama(), lr))["ffn"] == float(lr)


@pytest.mark.parametrize(
    ("weight_decay", "says"),
    [
        ("0.1", "without quotes, weight_decay=0.1"),
        ("none", "weight_decay is 'none'; expected a number"),
        (torch.tensor(0.1), "weight_decay=tensor.item()"),
        (None, "weight_decay is None; expected a number"),
        ({"norm": "0"}, "weight_decay: norm is '0'; expected a finite number"),
    ],
)
def test_a_weight_decay_that_is_no_number_says_what_to_write(weight_decay, says):
    with pytest.raises((TypeError, ValueError)) as error:
        param_groups(llama(), 1e-3, weight_decay=weight_decay)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"betas": ("0.9", "0.95")}, "expected numbers: betas=(0.9, 0.95)"),
        ({"betas": "0.9,0.95"}, "betas=(0.9, 0.95)"),
        ({"betas": 0.9}, "expected numbers in a tuple: betas=(0.9, 0.95)"),
        ({"eps": "1e-8"}, "expected numbers: eps=1e-08"),
    ],
)
def test_an_option_in_quotes_says_what_to_write(options, says):
    for take in (
        lambda: build_optimizer("adamw", llama(), 1e-3, **options),
        lambda: blockwise_optimizer(llama(), lr=1e-3, **options),
    ):
        with pytest.raises(TypeError) as error:
            take()
        assert says in str(error.value)
