"""Every causal language model of the installed transformers release, and others: all parameters claimed, attention by
function.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from architectures_page import PAGE, row, without_names
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap, classify, split_fused
from support.architectures import CAUSAL, OTHERS, build, build_other
from support.by_function import moved_by, problems
from support.case import Case
from support.cases import CASES
from support.cases_by_hand import BY_HAND
from support.proofs import (
    IDLE,
    MOVES_SCORES,
    NOT_INTERCEPTED,
    SERVES_BOTH,
    UNBUILDABLE,
    WITHOUT_ATTENTION,
    excused,
    inputs_for,
    varied,
    vary,
)

# The models' own notices, about kernels that are not there, say nothing about us.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in UNBUILDABLE])
def test_every_causal_model_is_claimed_and_its_attention_is_as_autograd_says(model_type: str) -> None:
    prove(model_type, None)


@pytest.mark.parametrize(("model_type", "task"), OTHERS)
def test_other_models_are_claimed_and_their_attention_is_as_autograd_says(model_type: str, task: str) -> None:
    prove(model_type, task)


def prove(model_type: str, task: str | None) -> None:
    model = varied(model_type, task)
    inputs = inputs_for(model, task)

    def output() -> Tensor:
        torch.manual_seed(0)  # of masks that some draw
        with torch.no_grad():
            found: Tensor = model(**inputs)[0]
        return found

    output()  # some change themselves in their first pass
    before = output()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = classify(model)
    assert set(whole) == names
    split_fused(model)
    assert torch.equal(output(), before)
    blocks = classify(model)
    proof = moved_by(model, blocks, partial(model, **inputs))
    assert row(model_type, task, whole, proof) in PAGE.read_text(encoding="utf-8").splitlines()
    found = [each for each in problems(blocks, proof) if not excused(model_type, each)]
    if model_type in NOT_INTERCEPTED:
        assert found
        assert all("not intercepted" in each for each in found)
    else:
        assert found == []
        assert bool(proof.attentions) == (model_type not in WITHOUT_ATTENTION)


@pytest.mark.parametrize("model_type", list(UNBUILDABLE))
def test_what_cannot_be_built_is_still_so(model_type: str) -> None:
    with pytest.raises((ValueError, ImportError, StrictDataclassClassValidationError)):
        build(model_type)


def test_the_lists_of_exceptions_name_types_that_there_are() -> None:
    listed = {*UNBUILDABLE, *WITHOUT_ATTENTION, *NOT_INTERCEPTED, *SERVES_BOTH, *MOVES_SCORES, *IDLE}
    assert listed <= {*CAUSAL, *dict(OTHERS)}


def test_the_proof_finds_what_is_in_the_wrong_block() -> None:
    model = varied("llama")
    blocks = classify(model)
    entries = {name: blocks.assignment(name) for name in blocks}
    queries, values = (f"model.layers.0.self_attn.{part}_proj.weight" for part in ("q", "v"))
    entries[queries], entries[values] = entries[values], entries[queries]
    wrong = BlockMap(entries)
    proof = moved_by(model, wrong, lambda: model(torch.randint(3, 90, (2, 12))))
    assert problems(wrong, proof) == [
        f"{queries} is vo; moves scores: True, values: False",
        f"{values} is qk; moves scores: False, values: True",
    ]


def test_the_proof_finds_a_matrix_of_attention_in_a_block_for_something_else() -> None:
    model = varied("llama")
    values = "model.layers.0.self_attn.v_proj.weight"
    wrong = classify(model, overrides={re.escape(values): Block.SSM})
    proof = moved_by(model, wrong, lambda: model(torch.randint(3, 90, (2, 12))))
    assert problems(wrong, proof) == [f"{values} is ssm; moves scores: False, values: True"]


def test_the_proof_finds_a_fused_weight_split_in_the_wrong_places() -> None:
    model = varied("gpt_neox")
    split_fused(model)
    blocks = classify(model)
    for module in model.modules():
        for parametrization in getattr(module, "parametrizations", {}).values():
            parametrization[0].repeats = 1  # as if all of q came before all of k
    proof = moved_by(model, blocks, lambda: model(torch.randint(3, 90, (2, 12))))
    assert len(problems(blocks, proof)) == 12


INSIDE_LAYERS = [case for case in CASES if case.name != "torch-attention-of-three-widths"]  # is one itself


@pytest.mark.parametrize("case", INSIDE_LAYERS, ids=lambda case: case.name)
def test_attention_of_the_cases_by_hand_is_as_autograd_says(case: Case) -> None:
    model = vary(split_fused(case.model()))
    blocks = classify(model)
    proof = moved_by(model, blocks, lambda: case.output(model))
    assert [each for each in problems(blocks, proof) if "attn.proj_l.weight is other" not in each] == []
    assert bool(proof.attentions) == (case.name != "hyena")


@pytest.mark.parametrize(("model_type", "task"), BY_HAND)
def test_blocks_are_those_written_out_by_hand(model_type: str, task: str | None) -> None:
    model = split_fused(build(model_type) if task is None else build_other(model_type, task))
    found: dict[str, set[str]] = {}
    for name, block in classify(model).items():
        found.setdefault(block.value, set()).add(as_in_cases(model, name))
    assert found == {block: set(names.split()) for block, names in BY_HAND[model_type, task].items()}


def as_in_cases(model: nn.Module, name: str) -> str:
    """A name with N for numbers, and a part of a fused weight as weight:q."""
    if split := re.fullmatch(r"(.*)\.parametrizations\.(\w+)\.original(\d+)", name):
        path, leaf, index = split.groups()
        parametrized: Any = model.get_submodule(path)
        name = f"{path}.{leaf}:{parametrized.parametrizations[leaf][0].part_names[int(index)]}"
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


@pytest.mark.slow
def test_how_little_names_decide_is_what_the_page_says() -> None:
    assert without_names() in PAGE.read_text(encoding="utf-8")
