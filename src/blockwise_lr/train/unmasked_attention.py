"""Causal attention without a mask, for windows that have neither padding nor several packed documents."""

from __future__ import annotations

from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

UNMASKED = "sdpa_unmasked"


def use_unmasked_attention(model: PreTrainedModel) -> None:
    """Let a model compute transformers' "sdpa" attention without first deciding whether it needs a mask.

    To decide, transformers compares the positions of every batch on the device, which makes the host wait in each
    forward pass. Under torch.compile it builds a mask instead, which rules out the fastest kernels. The windows of a
    run never need a mask, and without one the results are the same to the bit. The setting is not saved with the
    model.

    Args:
        model: a causal language model. Another attention than "sdpa" stays as it is.
    """
    if model.config._attn_implementation == "sdpa":
        # transformers makes no mask for an implementation that it has no mask function for.
        AttentionInterface.register(UNMASKED, sdpa_attention_forward)
        model.set_attn_implementation(UNMASKED)
