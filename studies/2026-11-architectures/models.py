"""The models of the study, in transformers' own classes, and how the parts of Mamba-2 are told apart."""

from __future__ import annotations

import shapes
import torch
from torch import Tensor, nn
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from blockwise_lr import Block, split_fused

NAMES = {
    "mamba-2": "Mamba-2",
    "mamba-2-parts": "Mamba-2 in parts",
    "qwen3-next": "Qwen3-Next",
    "mixtral": "Mixtral",
}
WIDTH, LAYERS = 64, 4
_COMMON = {
    "vocab_size": shapes.VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_PARTS = ("gate", "x", "b", "c", "dt")


class PartedProjection(nn.Module):
    """Mamba-2's input projection with a weight for each of its parts, in the order of `_PARTS`.

    In the duality of state-space models and attention (arXiv 2405.21060), C stands where the queries do, B where the
    keys do, x where the values do, and the output projection where attention's does.
    """

    def __init__(self, projection: nn.Linear, sizes: dict[str, int]) -> None:
        super().__init__()
        rows = projection.weight.detach().split([sizes[name] for name in _PARTS])
        for name, weight in zip(_PARTS, rows):
            self.register_parameter(name, nn.Parameter(weight.clone()))

    def forward(self, hidden: Tensor) -> Tensor:
        weights = [getattr(self, name) for name in _PARTS]
        return nn.functional.linear(hidden, torch.cat(weights))


def mamba_2() -> PreTrainedModel:
    """Mamba-2: no attention and no feed-forward layer; `classify` has SSM, CONV, NORM, EMB and HEAD."""
    return Mamba2ForCausalLM(
        Mamba2Config(**_COMMON, num_heads=4, head_dim=32, state_size=16, n_groups=1, expand=2, chunk_size=64)
    )


def mamba_2_in_parts() -> PreTrainedModel:
    """The same with its input projection in parts."""
    model = mamba_2()
    inner, state, heads = 2 * WIDTH, 16, 4
    sizes = {"gate": inner, "x": inner, "b": state, "c": state, "dt": heads}
    for layer in model.backbone.layers:
        layer.mixer.in_proj = PartedProjection(layer.mixer.in_proj, sizes)
    return model


def qwen3_next() -> PreTrainedModel:
    """A hybrid: three layers of gated linear attention and one of attention, all with dense feed-forward layers."""
    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **_COMMON,
            intermediate_size=4 * WIDTH,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            mlp_only_layers=list(range(LAYERS)),
            num_experts=0,
        )
    )
    split_fused(model)
    return model


def mixtral() -> PreTrainedModel:
    """The 0.6M LLaMA with eight experts of half its width in place of a feed-forward layer; two answer each token."""
    return MixtralForCausalLM(
        MixtralConfig(
            **_COMMON,
            intermediate_size=2 * WIDTH,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_local_experts=8,
            num_experts_per_tok=2,
            output_router_logits=True,
        )
    )


shapes.OTHERS |= {
    "mamba-2": mamba_2,
    "mamba-2-parts": mamba_2_in_parts,
    "qwen3-next": qwen3_next,
    "mixtral": mixtral,
}
shapes.OVERRIDES["mamba-2-parts"] = {
    r"in_proj\.[bc]$": Block.QK,
    r"in_proj\.x$": Block.VO,
    r"out_proj\.weight$": Block.VO,
    r"in_proj\.(gate|dt)$": Block.SSM,
}
