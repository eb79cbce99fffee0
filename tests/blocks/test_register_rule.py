"""register_rule: what users teach about their own modules, for every model and until it is taken back."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import blockwise_lr
from blockwise_lr import Block, classify, param_groups, register_rule, split_fused
from blockwise_lr.blocks import user_rules
from support.nano import NanoGPT


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    assert user_rules._REGISTERED == []
    yield
    user_rules._REGISTERED.clear()


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 2))
        self.inner = nn.ModuleDict({"odd": nn.Linear(3, 2)})


def gated() -> nn.Module:
    model = NanoGPT(layers=2)
    for block in model.transformer.h:
        block.gate = Gate()
    return model


def by_function(name: str, parameter: torch.Tensor, module: nn.Module) -> bool:
    return "gate" in name and parameter.ndim > 0 and isinstance(module, (Gate, nn.Linear))


@pytest.mark.parametrize("match", [Gate, r"\.gate\.", by_function])
def test_a_rule_by_class_pattern_or_function_claims_the_parameters_and_gives_its_reason(match) -> None:
    with pytest.raises(ValueError, match="6 parameters belong to no block"):
        classify(gated())
    rule = register_rule(match, Block.OTHER, "gates the residual stream")
    blocks = classify(gated())
    assert blocks["transformer.h.1.gate.table"] is Block.OTHER
    assert blocks["transformer.h.1.gate.inner.odd.bias"] is Block.OTHER
    assert blocks.reason("transformer.h.1.gate.table") == "gates the residual stream"
    assert len(param_groups(split_fused(gated()), lr=1e-3)) > 1
    rule.remove()
    rule.remove()
    with pytest.raises(ValueError, match="6 parameters belong to no block"):
        classify(gated())


def test_a_handle_is_called_or_left_to_take_the_rule_back() -> None:
    undo = register_rule(Gate, "other", "gates the residual stream")
    undo()
    with register_rule(Gate, "other", "gates the residual stream") as rule:
        assert classify(gated())["transformer.h.0.gate.table"] is Block.OTHER
        assert (rule.match, rule.block, rule.reason) == (Gate, Block.OTHER, "gates the residual stream")
    assert user_rules._REGISTERED == []


def test_overrides_come_first_then_the_latest_rule_then_the_built_in_ones() -> None:
    register_rule(nn.Linear, Block.OTHER, "the first")
    register_rule(r"c_fc\.", Block.CONV, "the second")
    blocks = classify(NanoGPT(), overrides={r"c_fc\.bias$": Block.SSM})
    assert blocks["transformer.h.0.mlp.c_fc.weight"] is Block.CONV
    assert blocks["transformer.h.0.mlp.c_fc.bias"] is Block.SSM
    assert blocks["transformer.h.0.mlp.c_proj.weight"] is Block.OTHER
    assert blocks["transformer.ln_f.weight"] is Block.NORM


def test_a_rule_that_holds_for_nothing_is_no_error_and_wrappers_change_no_name() -> None:
    register_rule(r"^transformer\.h\.\d+\.gate\.", Block.OTHER, "gates the residual stream")
    assert Block.OTHER not in classify(NanoGPT()).counts()
    compiled = torch.compile(gated(), backend="eager")
    assert classify(compiled)["transformer.h.0.gate.table"] is Block.OTHER


def test_the_error_of_an_unknown_parameter_names_register_rule_and_what_it_says_works() -> None:
    with pytest.raises(ValueError) as caught:
        classify(gated())
    line = re.search(r"^  (register_rule\(.*\))$", str(caught.value), flags=re.MULTILINE)
    assert line is not None
    for pattern in re.findall(r'r"(\^[^"]*)": Block\.OTHER', str(caught.value)):
        eval(line[1].replace(re.search(r'r"([^"]*)"', line[1])[1], pattern), vars(blockwise_lr))
    assert classify(gated())["transformer.h.1.gate.inner.odd.weight"] is Block.OTHER
    eval(line[1], vars(blockwise_lr))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (3, "ffn", "why"),
            TypeError,
            "register_rule got 3 to match; expected a module class, a regular expression",
        ),
        ((nn.ReLU(), "ffn", "why"), TypeError, "register_rule got ReLU() to match; expected a module class"),
        ((int, "ffn", "why"), TypeError, "register_rule got the class int, which is no nn.Module; expected"),
        (("(", "ffn", "why"), ValueError, 'register_rule: r"(" is not a valid regular expression'),
        (("x", "fnn", "why"), ValueError, "register_rule: 'fnn' is no Block; the blocks are: emb, qk"),
        (
            ("x", "ffn", None),
            TypeError,
            "register_rule: reason is None; expected a sentence (str) that says why",
        ),
        (("x", "ffn", " "), ValueError, "register_rule: reason is empty; expected a sentence that says why"),
    ],
)
def test_a_wrong_rule_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        register_rule(*arguments)
    assert user_rules._REGISTERED == []
