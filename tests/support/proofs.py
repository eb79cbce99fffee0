"""What the proofs of all architectures share: models, inputs, and the exceptions with their reasons."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from support.architectures import build, build_other, inputs_of

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
# Matrices that move the scores and make no queries or keys.
MOVES_SCORES = {
    "doge": ("dt_proj",),  # makes the mask
    "inkling2_text": ("clip.scale", "sink_proj"),
    "swinv2": ("logit_scale",),
}
# What has no effect in a causal model of tokens alone.
IDLE = {"xlnet": ("r_s_bias",)}


def varied(model_type: str, task: str | None = None) -> nn.Module:
    """The tiny model with no weight left at a constant: a gate at zero would hide what is behind it."""
    torch.manual_seed(0)
    return vary(build(model_type) if task is None else build_other(model_type, task))


def vary(model: nn.Module) -> nn.Module:
    """No weight of the model is at a constant any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_for(model: nn.Module, task: str | None) -> dict[str, Any]:
    """Tokens for a causal model; whatever the others take."""
    if task is None:
        return {"input_ids": torch.randint(3, 90, (4, 12)), "use_cache": False}
    return inputs_of(model)


def excused(model_type: str, problem: str) -> bool:
    """Whether a problem is one of the exceptions above."""
    names = [name for listed in (SERVES_BOTH, MOVES_SCORES, IDLE) for name in listed.get(model_type, ())]
    return any(name in problem for name in names)
