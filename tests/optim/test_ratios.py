import json
import math
from inspect import signature

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blockwise_lr import DEFAULT_RATIOS, MEASURED_RATIOS, PAPER_RATIOS, Block
from blockwise_lr.cli.inspect import InspectCommand
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from blockwise_lr.optim import param_groups, resolve_ratios
from blockwise_lr.optim.ratios import NAMED_RATIOS, spell_ratios
from blockwise_lr.optimizers import build_optimizer
from blockwise_lr.train.config import OptimConfig, config_from_dict
from blockwise_lr.train.presets import PRESETS
from blockwise_lr.train.ratio_text import parse_ratios


def test_the_papers_ratios_are_those_of_the_paper():
    assert PAPER_RATIOS == {Block.NORM: 1, Block.VO: 4, Block.FFN: 6, Block.QK: 8, Block.EMB: 10}


def test_the_default_ratios_are_half_way_from_measured_to_uniform():
    assert set(DEFAULT_RATIOS) == set(MEASURED_RATIOS)
    for block, ratio in DEFAULT_RATIOS.items():
        assert ratio == pytest.approx(MEASURED_RATIOS[block] ** 0.5, rel=0.07)
    assert DEFAULT_RATIOS[Block.FFN] == 1  # so the base learning rate is a uniform one
    assert all(resolve_ratios("half")[block] == 1 for block in Block if block not in DEFAULT_RATIOS)


def test_whatever_is_not_given_is_the_default():
    """Functions, the trainer and the command line agree, and all follow one constant."""
    default = resolve_ratios(DEFAULT_RATIOS)
    model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
    for groups in (
        param_groups(model, lr=1e-3),
        build_optimizer("adamw", model, 1e-3).param_groups,
        blockwise_optimizer(model, lr=1e-3)[1]["params"],
    ):
        assert {Block(group["block"]): group["lr_ratio"] for group in groups} == {
            block: default[block] for block in (Block.NORM, Block.EMB)
        }
    assert signature(BlockwiseTrainer.__init__).parameters["ratios"].default is DEFAULT_RATIOS
    assert resolve_ratios(parse_ratios(OptimConfig().ratios)) == default
    assert resolve_ratios(parse_ratios(InspectCommand().ratios)) == default
    assert {preset.optim.ratios for preset in PRESETS.values()} == {OptimConfig().ratios}


def test_a_configuration_that_names_the_papers_ratios_still_means_them():
    """Every config.json names its ratios, so runs of earlier versions keep theirs."""
    saved = {"preset": "llama-134m", "optim": {"ratios": "paper", "base_lr": 6e-4}}
    assert parse_ratios(config_from_dict(saved).optim.ratios) == PAPER_RATIOS


def test_a_missing_block_has_ratio_one_so_the_untied_head_does():
    assert resolve_ratios(PAPER_RATIOS)[Block.HEAD] == 1.0
    assert set(resolve_ratios({})) == set(Block)


def test_the_papers_ratios_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        PAPER_RATIOS[Block.EMB] = 1  # type: ignore[index]


def test_strings_and_blocks_mean_the_same():
    assert resolve_ratios({"qk": 3}) == resolve_ratios({Block.QK: 3.0})


@pytest.mark.parametrize("number", [np.int64, np.float32, np.float64])
def test_numpys_numbers_are_ratios(number):
    ratios = resolve_ratios({"qk": number(8)})
    assert ratios[Block.QK] == 8
    assert type(ratios[Block.QK]) is float


def test_an_unknown_block_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(
        ValueError, match=r"ratios: 'attention' is not a block; the blocks are emb, qk, vo, ffn, norm"
    ):
        resolve_ratios({"attention": 2})


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_a_ratio_that_is_not_above_zero_is_refused(bad):
    with pytest.raises(ValueError, match="ratios: qk is .*; expected a finite number above 0"):
        resolve_ratios({"qk": bad})


@pytest.mark.parametrize("bad", ["4", None, True])
def test_a_ratio_that_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="ratios: qk is .*; expected a finite number above 0"):
        resolve_ratios({"qk": bad})


@pytest.mark.parametrize("name", NAMED_RATIOS)
def test_a_name_means_its_ratios_and_names_no_other_block(name):
    assert parse_ratios(name) == NAMED_RATIOS[name]


@given(st.dictionaries(st.sampled_from(Block), st.floats(1e-6, 1e6)))
def test_spelling_and_parsing_are_inverse(ratios):
    assert resolve_ratios(parse_ratios(spell_ratios(ratios))) == resolve_ratios(ratios)


def test_ratios_come_from_a_json_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"emb": 4, "vo": 0.5}))
    assert parse_ratios(str(path)) == parse_ratios("emb=4, vo=0.5") == {Block.EMB: 4, Block.VO: 0.5}


def test_text_that_means_no_ratios_says_what_would():
    with pytest.raises(
        ValueError,
        match=r"'papper' is no file and none of uniform, half, paper, measured, quickstart, auto; expected one of",
    ):
        parse_ratios("papper")
    with pytest.raises(ValueError, match="ratios: 'emb=four': could not convert string to float"):
        parse_ratios("emb=four")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "holds list; expected")])
def test_a_file_that_holds_no_ratios_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"mine.json {message}"):
        parse_ratios(str(path))


def test_pairs_that_are_none_or_there_twice_are_refused():
    with pytest.raises(ValueError, match="ratios: 'vo' is no pair such as \"emb=4\" \\(in 'emb=4,vo'\\)"):
        parse_ratios("emb=4,vo")
    with pytest.raises(ValueError, match="ratios: emb is there twice .*; expected every block once"):
        parse_ratios("emb=4,emb=8")
