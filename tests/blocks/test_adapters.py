"""LoRA adapters and parametrizations are in the block of the weight that they adapt, and say so."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockwise_lr.blocks import Block, classify, split_fused
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


OTHER_KINDS = {
    "AdaLoRA": AdaLoraConfig(total_step=10, target_modules=["q_proj", "down_proj"]),
    "IA3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "LoKr": LoKrConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "OFT": OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "down_proj"]),
    "VeRA": VeraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "tokens": TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_adapters_of_peft_are_in_the_block_of_their_weight(kind: str) -> None:
    blocks = classify(get_peft_model(build("llama"), OTHER_KINDS[kind]))
    assert blocks
    for name, block in blocks.items():
        projection = next(part for part in name.split(".") if part in PROJECTIONS)
        assert block == PROJECTIONS[projection], name
        assert " adapter of base_model.model.model." in blocks.reason(name), name
    assert {block.value for block in blocks.values()} == ({"emb"} if kind == "tokens" else {"qk", "ffn"})


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


def test_the_adapter_of_torchs_attention_is_in_the_sharper_of_the_blocks_of_its_fused_weight() -> None:
    layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)])
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["self_attn"]))
    blocks = classify(model)
    assert len(blocks) == 8
    assert set(blocks.values()) == {"vo"}
    for name in blocks:
        of = (
            "out_proj.base_layer.weight, which makes"
            if "out_proj" in name
            else "in_proj_weight, which makes queries"
        )
        assert f"self_attn.base_layer.{of}" in blocks.reason(name), name


@pytest.mark.parametrize(
    "targets",
    [["experts.down_proj"], ["experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"]],
)
def test_the_adapter_of_stacked_experts_is_in_their_block(targets: list[str]) -> None:
    model = adapted(
        "qwen3_moe", target_modules=["q_proj"], target_parameters=[f"mlp.{each}" for each in targets]
    )
    blocks = classify(model)
    found = {name: blocks.reason(name) for name in blocks if "experts" in name}
    assert {blocks[name] for name in found} == {"ffn"}
    for target in targets:
        named = [reason for reason in found.values() if f"{target.partition('.')[2]}, which" in reason]
        assert len(named) == 4, target  # two factors in each of two layers


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
        ),
    ],
)
def test_the_matrices_that_make_virtual_tokens_are_no_output_head(config: PromptEncoderConfig) -> None:
    found = {name: block.value for name, block in classify(get_peft_model(build("llama"), config)).items()}
    assert found.pop("prompt_encoder.default.embedding.weight") == "emb"
    assert set(found.values()) == {"other"}


class LowRank(nn.Module):
    """A LoRA adapter as a parametrization, with a bare factor and one in a module."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight.shape[1]))
        self.up = nn.Linear(2, weight.shape[0], bias=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up.weight @ self.down


@pytest.mark.parametrize("split", [False, True])
def test_what_a_parametrization_adds_is_in_the_block_of_its_weight(split: bool) -> None:
    model = split_fused(build("gpt2")) if split else build("gpt2")
    expected = {"attn.c_attn": "vo", "attn.c_proj": "vo", "mlp.c_fc": "ffn"}
    for name in expected:
        module = model.transformer.h[0].get_submodule(name)
        parametrize.register_parametrization(module, "weight", LowRank(module.weight))
    blocks = classify(model)
    assert list(blocks) == [name for name, _ in model.named_parameters()]
    for name, block in expected.items():
        added = f"transformer.h.0.{name}.parametrizations.weight.{int(split and name == 'attn.c_attn')}"
        for leaf in ("down", "up.weight"):
            assert blocks[f"{added}.{leaf}"] == block
            reason = blocks.reason(f"{added}.{leaf}")
            assert reason.startswith(f"in a parametrization of transformer.h.0.{name}.weight, which ")
    assert classify(model, {r"\.down$": Block.OTHER})[f"{added}.down"] == "other"


def test_an_adapter_of_a_weight_that_no_rule_knows_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Linear(4, 3)

    model = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["odd"]))
    with pytest.raises(ValueError, match=r"base_model\.model\.odd\.lora_A\.default\.weight  shape \(2, 4\)"):
        classify(model)
