"""LoRA adapters are in the block of the weight that they adapt, and say so."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from blockwise_lr.blocks import classify
from support.architectures import build

PROJECTIONS = {
    "q_proj": "qk",
    "k_proj": "qk",
    "v_proj": "vo",
    "o_proj": "vo",
    "gate_proj": "ffn",
    "up_proj": "ffn",
    "down_proj": "ffn",
    "embed_tokens": "emb",
}


def adapted(model_type: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = get_peft_model(build(model_type), LoraConfig(r=4, **options))
    return model


def test_every_factor_is_in_the_block_of_its_weight_and_nothing_else_is_there() -> None:
    model = adapted("llama", target_modules=list(PROJECTIONS), use_dora=False)
    blocks = classify(model)
    assert list(blocks) == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, block in blocks.items():
        projection = next(part for part in name.split(".") if part in PROJECTIONS)
        assert block == PROJECTIONS[projection], name
        assert blocks.reason(name).startswith("a LoRA adapter of base_model.model.model."), name


def test_modules_that_are_trained_whole_keep_their_blocks() -> None:
    model = adapted("llama", target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    found = {name.partition("base_model.model.")[2]: block.value for name, block in classify(model).items()}
    assert found["lm_head.modules_to_save.default.weight"] == "head"
    assert found["model.norm.modules_to_save.default.weight"] == "norm"


def test_the_adapter_of_a_fused_weight_is_in_the_sharper_of_its_blocks() -> None:
    blocks = classify(adapted("gpt2", target_modules=["c_attn"], fan_in_fan_out=True))
    assert set(blocks.values()) == {"vo"}
    assert all(
        "queries, keys, values" in blocks.reason(name)
        and "the sharper block of the two" in blocks.reason(name)
        for name in blocks
    )


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}])
def test_magnitudes_and_biases_follow_too(options: dict[str, object]) -> None:
    blocks = classify(adapted("qwen2", target_modules=["q_proj", "v_proj"], **options))
    for name, block in blocks.items():
        if "q_proj" in name or "k_proj" in name:
            assert block == "qk", name
        elif "v_proj" in name:
            assert block == "vo", name
    assert {"qk", "vo"} <= set(blocks.values())


def test_an_adapter_of_a_weight_that_no_rule_knows_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Linear(4, 3)

    model = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["odd"]))
    with pytest.raises(ValueError, match=r"base_model\.model\.odd\.lora_A\.default\.weight  shape \(2, 4\)"):
        classify(model)
