"""Every causal language model of the installed transformers release, and others: all parameters claimed, attention by
function.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor, nn

from architectures import CAUSAL, OTHERS, build, build_other, inputs_of
from blockwise_lr.blocks import BlockMap, classify, split_fused
from by_function import moved_by, problems

# The models' own notices, about kernels that are not there, say nothing about us.
pytestmark = pytest.mark.filterwarnings("ignore")

UNBUILDABLE = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "all layers of this drafter share the cache of another model, which its own configuration refuses",
) | {"gemma3n": "its vision tower is timm's, which is not installed"}

WITHOUT_ATTENTION = dict.fromkeys(
    ("falcon_mamba", "mamba", "mamba2", "rwkv", "convnext", "convnextv2", "fnet"),
    "no attention and nothing that has queries, keys and values",
)
NOT_INTERCEPTED = {
    "longformer": "its scores are cut into chunks and shifted before they meet the values: hand-written case",
    "minimax": "lightning attention multiplies q, k and v in place: hand-written case",
    "reformer": "LSH attention runs in an autograd function of its own: hand-written case",
    "xlstm": "its kernels are autograd functions of their own: hand-written case",
}
# What serves scores and values both, and is in the sharper of the two blocks.
SERVES_BOTH = {"doge": ("v_proj",)}
# What has no effect in a causal model of tokens alone.
IDLE = {"xlnet": ("r_s_bias",)}


def varied(model_type: str, task: str | None = None) -> nn.Module:
    """The tiny model with no weight left at a constant: a gate at zero would hide what is behind it."""
    torch.manual_seed(0)
    model = build(model_type) if task is None else build_other(model_type, task)
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in UNBUILDABLE])
def test_every_causal_model_is_claimed_and_its_attention_is_as_autograd_says(model_type: str) -> None:
    prove(model_type, varied(model_type), {"input_ids": torch.randint(3, 90, (4, 12)), "use_cache": False})


@pytest.mark.parametrize(("model_type", "task"), OTHERS)
def test_other_models_are_claimed_and_their_attention_is_as_autograd_says(model_type: str, task: str) -> None:
    model = varied(model_type, task)
    prove(model_type, model, inputs_of(model))


def prove(model_type: str, model: nn.Module, inputs: dict[str, Any]) -> None:
    def output() -> Tensor:
        torch.manual_seed(0)  # of masks that some draw
        with torch.no_grad():
            found: Tensor = model(**inputs)[0]
        return found

    output()  # some change themselves in their first pass
    before = output()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(classify(model)) == names
    split_fused(model)
    assert torch.equal(output(), before)
    blocks = classify(model)
    proof = moved_by(model, blocks, **inputs)
    excused = (*SERVES_BOTH.get(model_type, ()), *IDLE.get(model_type, ()))
    found = [each for each in problems(blocks, proof) if not any(name in each for name in excused)]
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
    listed = {*UNBUILDABLE, *WITHOUT_ATTENTION, *NOT_INTERCEPTED, *SERVES_BOTH, *IDLE}
    assert listed <= {*CAUSAL, *dict(OTHERS)}


def test_the_proof_finds_what_is_in_the_wrong_block() -> None:
    model = varied("llama")
    blocks = classify(model)
    entries = {name: blocks.assignment(name) for name in blocks}
    queries, values = (f"model.layers.0.self_attn.{part}_proj.weight" for part in ("q", "v"))
    entries[queries], entries[values] = entries[values], entries[queries]
    wrong = BlockMap(entries)
    proof = moved_by(model, wrong, input_ids=torch.randint(3, 90, (2, 12)))
    assert problems(wrong, proof) == [
        f"{queries} is vo; moves scores: True, values: False",
        f"{values} is qk; moves scores: False, values: True",
    ]


def test_the_proof_finds_a_fused_weight_split_in_the_wrong_places() -> None:
    model = varied("gpt_neox")
    split_fused(model)
    blocks = classify(model)
    for module in model.modules():
        for parametrization in getattr(module, "parametrizations", {}).values():
            parametrization[0].repeats = 1  # as if all of q came before all of k
    proof = moved_by(model, blocks, input_ids=torch.randint(3, 90, (2, 12)))
    assert len(problems(blocks, proof)) == 12
