"""Patterns are few, readable and right for any names, or refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwise_lr.export.fragments import ANCHORED, GLOBS, SEARCHED, SUBSTRINGS, Style
from blockwise_lr.export.patterns import find_patterns
from blockwise_lr.export.proof import first_match, prove

STYLES = {style.name: style for style in (SEARCHED, ANCHORED, GLOBS)}
LAYERS = {
    "emb": ["model.embed_tokens.weight"],
    "qk": [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(12) for p in "qk"],
    "vo": [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(12) for p in "vo"],
    "ffn": [f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(12) for p in ("gate", "up", "down")],
    "norm": ["model.norm.weight"]
    + [f"model.layers.{i}.{p}_layernorm.weight" for i in range(12) for p in ("input", "post_attention")],
    "head": ["lm_head.weight"],
}


def groups_of(name: str, found: dict[str, list[str]], style: Style) -> set[str]:
    return {label for label, patterns in found.items() if any(style.matches(each, name) for each in patterns)}


def test_a_llama_needs_one_short_expression_a_block():
    assert find_patterns(LAYERS, SEARCHED) == {
        "emb": [r"\.embed_tokens\."],
        "qk": [r"\.(?:q_proj|k_proj)\."],
        "vo": [r"\.(?:v_proj|o_proj)\."],
        "ffn": [r"\.mlp\."],
        "norm": [r"norm\."],
        "head": [r"^lm_head\."],
    }


def test_wildcards_and_anchored_expressions_of_a_llama():
    assert find_patterns(LAYERS, GLOBS)["qk"] == ["*.q_proj.*", "*.k_proj.*"]
    assert find_patterns(LAYERS, ANCHORED)["head"] == [r"lm_head\."]
    assert find_patterns(LAYERS, ANCHORED)["qk"] == [r".*\.(?:q_proj|k_proj)\."]
    assert find_patterns(LAYERS, SUBSTRINGS)["qk"] == [".q_proj.", ".k_proj."]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_patterns_hold_for_more_layers_than_they_were_made_from(style):
    few = {label: [name for name in names if ".1" not in name] for label, names in LAYERS.items()}
    found = find_patterns(few, style)
    assert all(groups_of(name, found, style) == {label} for label, names in LAYERS.items() for name in names)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_layers_number_is_kept_where_it_decides(style):
    groups = {"emb": ["net.0.weight"], "ffn": ["net.1.weight", "net.3.weight"], "head": ["net.10.weight"]}
    found = find_patterns(groups, style)
    assert all(groups_of(name, found, style) == {label} for label, names in groups.items() for name in names)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_special_characters_are_plain(style):
    groups = {"a": ["w+x.a(b)"], "b": ["wwx.ab"]}
    found = find_patterns(groups, style)
    assert all(groups_of(name, found, style) == {label} for label, (name,) in groups.items())


WORDS = st.sampled_from(
    ["q", "k", "qk", "attn", "attn_norm", "norm", "mlp", "weight", "bias", "0", "1", "12", "h"]
)
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(".".join)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(NAMES, st.sampled_from(["a", "b", "c"]), min_size=1, max_size=12),
    st.sampled_from(list(STYLES.values())),
)
def test_any_names_match_patterns_of_their_own_group_alone(owner, style):
    groups = {label: [n for n, of in owner.items() if of == label] for label in dict.fromkeys(owner.values())}
    found = find_patterns(groups, style)
    assert all(groups_of(name, found, style) == {label} for name, label in owner.items())


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(NAMES, st.sampled_from(["a", "b"]), min_size=1, max_size=10))
def test_no_pattern_is_superfluous(owner):
    groups = {label: [n for n, of in owner.items() if of == label] for label in dict.fromkeys(owner.values())}
    for label, patterns in find_patterns(groups, GLOBS).items():
        for left_out in patterns:
            rest = [each for each in patterns if each is not left_out]
            assert not all(any(GLOBS.matches(p, name) for p in rest) for name in groups[label])


def test_names_that_no_substring_tells_apart_are_refused():
    with pytest.raises(
        ValueError, match=r"no substring matches q.weight without .* give the two blocks one ratio"
    ):
        find_patterns({"a": ["q.weight"], "b": ["k.q.weight"]}, SUBSTRINGS)


def test_the_proof_names_a_parameter_that_the_rule_puts_elsewhere():
    rule = first_match({"qk": ["q", "k"], "norm": ["norm"]}, lambda pattern, name: pattern in name)
    prove("it", {"h.q": "qk", "h.norm": "norm", "h.v": None}, rule)
    with pytest.raises(ValueError, match="would put h.knorm into qk, but its group is norm"):
        prove("it", {"h.knorm": "norm"}, rule)
    with pytest.raises(ValueError, match="would put h.v into no group, but its group is vo"):
        prove("it", {"h.v": "vo"}, rule)
